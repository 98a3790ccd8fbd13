"""Attention over kept tokens that tells the gate of every token, kept or dropped, what it is worth."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from qts_kernels._schemas import statistics_dtype

LOGITS = 2**23
"""Most logits held at a time: 32 MiB of fp32."""
_LARGEST_EXPONENT = 60.0


def gate_attention(
    attended: Tensor, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor
) -> Tensor:
    r"""``attended``, with the gradient that reaches the gates g.

    Attention with multiplicative gates is :math:`o_q = \sum_j g_j e^{l_{qj}} v_j / \sum_j g_j e^{l_{qj}}` over all
    tokens j. Where g is 1 for the kept tokens and 0 for the dropped ones, that is attention over the kept ones alone,
    which ``attended`` holds already, with its gradients in query, key and value; and a gate's own gradient is
    :math:`\partial o_q / \partial g_j = e^{l_{qj}} (v_j - o_q) / Z_q`, which no gate stops, a dropped token's neither.

    Nothing is computed before the backward, and there the logits of ``LOGITS`` pairs at a time. Weights above e^60,
    of a dropped token that outshines all kept ones, count as e^60.

    Args:
        attended: [N, H, Dh], attention of ``query`` over the kept tokens.
        query: [N, H, Dh], of the kept tokens.
        key, value: [T, Hkv, Dh], of all tokens; GQA.
        gate: [T], 1 where kept and 0 where dropped. The only input besides ``attended`` that gets a gradient.
        cu_seqlens: int32 [S+1] offsets in query. cu_seqlens_k: in key, value and gate.

    Returns:
        ``attended``. Reading the offsets synchronises, in the backward.
    """
    return _GateAttention.apply(
        attended, query.detach(), key.detach(), value.detach(), gate, cu_seqlens, cu_seqlens_k, LOGITS
    )


class _GateAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended, query, key, value, gate, cu_seqlens, cu_seqlens_k, logits) -> Tensor:
        ctx.save_for_backward(attended, query, key, value, gate, cu_seqlens, cu_seqlens_k)
        ctx.logits = logits
        return attended.view_as(attended)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attended, query, key, value, gate, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
        of_gate = torch.zeros_like(gate)
        offsets = zip(pairwise(cu_seqlens.tolist()), pairwise(cu_seqlens_k.tolist()), strict=False)
        for (first, end), (first_key, end_key) in offsets:
            rows, keys = slice(first, end), slice(first_key, end_key)
            if end > first:
                of_gate[keys] = _segment(
                    attended[rows], grad[rows], query[rows], key[keys], value[keys], gate[keys] > 0, ctx.logits
                )
        return grad, None, None, None, of_gate, None, None, None


def _segment(
    attended: Tensor, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, kept: Tensor, logits: int
) -> Tensor:
    """The gates' gradient [M] of one segment: kept bool [M], key and value [M, Hkv, Dh], the others [N, H, Dh]."""
    dtype = statistics_dtype(query)
    key, value = key.to(dtype).permute(1, 2, 0), value.to(dtype).permute(1, 2, 0)  # [Hkv, Dh, M]
    length, scale = len(kept), query.shape[2] ** -0.5
    total = torch.zeros(length, dtype=dtype, device=query.device)
    for chunk in torch.arange(len(query)).split(max(1, logits // (query.shape[1] * length))):
        rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
        # [n, H, Dh] -> [Hkv, n * G, Dh]: the query heads that share a key head are rows of one product.
        q, o, do = (
            x[rows].to(dtype).unflatten(1, (key.shape[0], -1)).transpose(0, 1).flatten(1, 2)
            for x in (query, attended, grad)
        )
        logit = q @ key * scale
        normaliser = logit.masked_fill(~kept, -torch.inf).logsumexp(-1, keepdim=True)
        weight = logit.sub_(normaliser).clamp_(max=_LARGEST_EXPONENT).exp_()
        total += weight.mul_((do @ value).sub_((do * o).sum(-1, keepdim=True))).sum((0, 1))
    return total
