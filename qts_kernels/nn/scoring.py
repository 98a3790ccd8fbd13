"""The scoring layers: how relevant each vision token is to the question (QTSplus, arXiv 2511.11910)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qts_kernels.nn.layers import EPS, AttentionBlock, fold_norm
from qts_kernels.nn.packing import Packed
from qts_kernels.ops.reencode.attention import varlen_attention
from qts_kernels.ops.relevance.api import relevance


class RelevanceLayer(nn.Module):
    r"""The last scoring layer: r_m = max over heads and question tokens of
    :math:`\mathrm{softmax}_m(\langle W_q N(q_l), W_k N(x_m) \rangle / \sqrt{d_h})`, N an RMSNorm, GQA, no RoPE.

    Of a whole layer this uses W_q, W_k and two norms; the rest would be dead. So would be W_k's bias: it adds the same
    to all logits of a question token, and leaves the softmax.
    """

    dead = (
        "k_proj.bias",
        "v_proj.weight",
        "v_proj.bias",
        "o_proj.weight",
        "ffn_norm.weight",
        "ffn.net.0.weight",
        "ffn.net.0.bias",
        "ffn.net.2.weight",
        "ffn.net.2.bias",
    )
    """What a released layer has beyond this one: accepted in a state dict, and dropped."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
        self.q_norm = nn.RMSNorm(d_model, EPS)
        self.kv_norm = nn.RMSNorm(d_model, EPS)
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.head_dim, bias=False)

    def forward(
        self, question: Tensor, vision: Packed, key_scale: Tensor, cu_question: Tensor, cu_vision: Tensor
    ) -> Tensor:
        """Relevance fp32 [M] in packed order.

        Args:
            question: [L, D] packed rows.
            vision: M raw tokens. They are never normalised nor copied: RMSNorm(x) W_k = (1/rms) (x (w W_k)).
            key_scale: fp32 [M], 1/rms of each vision row, in packed order.
            cu_question, cu_vision: int32 [S+1], every row in a segment.
        """
        query = self.q_proj(self.q_norm(question)).unflatten(-1, (-1, self.head_dim))
        key = vision.pack(F.linear(vision.rows, fold_norm(self.kv_norm, self.k_proj)))
        return relevance(
            query,
            key.unflatten(-1, (-1, self.head_dim)),
            key_scale=key_scale,
            cu_seqlens_q=cu_question,
            cu_seqlens_k=cu_vision,
        )


class ScoringLayer(AttentionBlock):
    """An earlier scoring layer: the question reads the vision tokens. q += o_proj(attention); q += FFN(N q)."""

    def forward(
        self, question: Tensor, vision: Packed, key_scale: Tensor, cu_question: Tensor, cu_vision: Tensor
    ) -> Tensor:
        """The question's rows [L, D] after this layer. Arguments as for ``RelevanceLayer``."""
        query = self.split_heads(self.q_proj(self.q_norm(question)))
        attended = varlen_attention(
            query,
            self._project(vision, key_scale, self.k_proj).to(query.dtype),
            self._project(vision, key_scale, self.v_proj).to(query.dtype),
            cu_question,
            question.shape[0],
            cu_seqlens_k=cu_vision,
            max_seqlen_k=vision.max_seqlen if vision.order is None else vision.rows.shape[0],
        )
        question = question + self.o_proj(attended.flatten(1)).to(question.dtype)
        return question + self.ffn(self.ffn_norm(question)).to(question.dtype)

    def _project(self, vision: Packed, key_scale: Tensor, projection: nn.Linear) -> Tensor:
        rows = vision.pack(F.linear(vision.rows, fold_norm(self.kv_norm, projection)))
        return self.split_heads(
            torch.addcmul(projection.bias.to(key_scale.dtype), rows.to(key_scale.dtype), key_scale[:, None])
        )
