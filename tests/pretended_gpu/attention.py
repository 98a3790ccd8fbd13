"""torch's variable-length attention, which has no CPU kernel, by ops of its schema's names."""

from itertools import pairwise

import torch
from torch import Tensor


def _probabilities(query: Tensor, key: Tensor, causal: bool, scale: float) -> Tensor:
    logits = torch.einsum("qhd,khd->hqk", query, key) * scale
    if causal:
        logits += torch.full_like(logits, -torch.inf).triu(1 + key.shape[0] - query.shape[0])
    return logits.softmax(-1)


def _segments(cu_q: Tensor, cu_k: Tensor):
    for (a, b), (c, d) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        if b > a:
            yield slice(a, b), slice(c, d)


def _varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, is_causal=False, scale=None, window_size=None):
    """Rows that no segment has are left unwritten: NaN."""
    out = torch.full_like(query, torch.nan)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for rows, keys in _segments(cu_q, cu_k):
        p = _probabilities(query[rows].double(), key[keys].double(), is_causal, scale)
        out[rows] = torch.einsum("hqk,khd->qhd", p, value[keys].double()).to(out.dtype)
    logsumexp = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
    return out, logsumexp, torch.zeros(2, dtype=torch.uint64)


def _varlen_attn_backward(
    grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, is_causal, rng_state, scale=None, window_size=None
):
    grads = [torch.full_like(x, torch.nan) for x in (query, key, value)]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    for rows, keys in _segments(cu_q, cu_k):
        q, k, v, g = (x.double() for x in (query[rows], key[keys], value[keys], grad[rows]))
        p = _probabilities(q, k, is_causal, scale)
        grad_p = torch.einsum("qhd,khd->hqk", g, v)
        grad_logits = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * scale
        grads[0][rows] = torch.einsum("hqk,khd->qhd", grad_logits, k).to(query.dtype)
        grads[1][keys] = torch.einsum("hqk,qhd->khd", grad_logits, q).to(key.dtype)
        grads[2][keys] = torch.einsum("hqk,qhd->khd", p, g).to(value.dtype)
    return tuple(grads)
