"""The re-encoder: kept tokens see each other, and when they were."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qts_kernels.nn.gate import Gate
from qts_kernels.nn.gate_attention import gate_attention
from qts_kernels.nn.layers import EPS, AttentionBlock, fold_norm
from qts_kernels.ops.reencode.api import add_rms_norm
from qts_kernels.ops.reencode.attention import varlen_attention


class ReencodeLayer(nn.Module):
    """A bidirectional layer over each segment: z += o_proj(attention(N z)); z += FFN(N z). GQA, no RoPE.

    The residual add before its first norm belongs to whoever made z, so that the two run in one pass.
    """

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.core = AttentionBlock(d_model, num_heads, num_kv_heads)

    def forward(
        self,
        residual: Tensor,
        normed: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        gate: Gate | None = None,
        normed_all: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """residual z [N, D], and normed [N, D] = z / rms(z), without a weight -> (update, z') with the layer's output
        z' + update. Rows behind ``cu_seqlens[-1]`` come out finite where they went in finite.

        ``gate`` gets its gradient through the attention, where ``normed_all`` [T, D] says what the dropped tokens would
        have been; the output is the same.
        """
        core = self.core
        # The small weights take the norm's weight; W_q is as large as the rows of a short video, so there they do.
        weight = torch.cat([fold_norm(core.kv_norm, core.k_proj), fold_norm(core.kv_norm, core.v_proj)])
        bias = torch.cat([core.k_proj.bias, core.v_proj.bias])
        key, value = F.linear(normed, weight, bias).chunk(2, dim=-1)
        query, key, value = map(core.split_heads, (core.q_proj(normed * core.q_norm.weight), key, value))
        attended = varlen_attention(query, key, value, cu_seqlens, max_seqlen)
        if gate is not None:
            with torch.no_grad():
                keys, values = map(core.split_heads, F.linear(normed_all, weight, bias).chunk(2, dim=-1))
            attended = gate_attention(attended, query, keys, values, gate.value, cu_seqlens, gate.vision.cu_seqlens)
        update = core.o_proj(attended.flatten(1))
        residual, normed = add_rms_norm(update.to(residual.dtype), residual, core.ffn_norm.weight, EPS)
        return core.ffn(normed).to(residual.dtype), residual
