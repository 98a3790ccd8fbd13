"""Relevance in eager PyTorch: the specification. It stores a segment's whole attention matrix; the other
implementations do not."""

import torch
from torch import Tensor

from qts_kernels._schemas import statistics_dtype


def relevance(
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    column_start: Tensor | None,
    cu_columns: Tensor | None,
    total_columns: int,
    reduce: str,
    scale: float,
    causal: bool,
    with_argrow: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``qts_kernels.relevance`` for the formula and ``_schemas`` for the shapes."""
    dtype = statistics_dtype(query)
    rows, heads, _ = query.shape
    scores = torch.zeros(total_columns, dtype=dtype, device=query.device)
    lse = torch.full((heads, rows), -torch.inf, dtype=dtype, device=query.device)
    argrow = torch.zeros(
        total_columns if with_argrow and reduce == "max" else 0, dtype=torch.int64, device=query.device
    )
    for q, k, columns, out in segments(cu_seqlens_q, cu_seqlens_k, column_start, cu_columns):
        if q.start == q.stop or k.start == k.stop:
            continue
        logits = segment_logits(query[q], key[k], None if key_scale is None else key_scale[k], scale, causal)
        lse[:, q] = logits.logsumexp(-1)
        # A row that sees no key has lse = -inf and takes part in nothing.
        weights = (logits - lse[:, q, None]).exp().masked_fill(lse[:, q, None] == -torch.inf, 0)
        weights = weights[:, :, columns].flatten(0, 1)
        if reduce == "mean":
            scores[out] = weights.mean(0)
        elif out.start < out.stop:
            scores[out], row = weights.max(0)
            if with_argrow:
                length = q.stop - q.start
                argrow[out] = row // length * rows + q.start + row % length
    return scores, lse, argrow


def relevance_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    key_scale: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    column_start: Tensor | None,
    cu_columns: Tensor | None,
    scores: Tensor,
    lse: Tensor,
    argrow: Tensor,
    reduce: str,
    scale: float,
    causal: bool,
    block: int = 4096,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``relevance``, recomputing the weights a block of keys at a time (nothing of size H x L x M is
    stored).

    With weights p[r, m] and w[r, m] = d score[m] / d p[r, m] (mean: 1/(H L); max: 1 at the row that attains it, or 0):
    d logit[r, m] = p[r, m] (w[r, m] g[m] - c[r]),  c[r] = sum_m w[r, m] g[m] p[r, m].
    """
    dtype = statistics_dtype(query)
    rows, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    grad_query = torch.zeros(rows, heads, head_dim, dtype=dtype, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=query.device)
    grad_scale = torch.zeros(key.shape[0] if key_scale is not None else 0, dtype=dtype, device=query.device)
    for q, k, columns, out in segments(cu_seqlens_q, cu_seqlens_k, column_start, cu_columns):
        length, keys = q.stop - q.start, k.stop - k.start
        if length == 0 or keys == 0:
            continue
        g = torch.zeros(keys, dtype=dtype, device=query.device)
        g[columns] = grad[out].to(dtype)
        row = None
        if reduce == "max":
            packed = argrow[out]
            row = torch.zeros(keys, dtype=torch.int64, device=query.device)
            row[columns] = packed // rows * length + packed % rows - q.start
        seen = (lse[:, q] != -torch.inf).flatten()[:, None]

        def weights(b: slice, q: slice = q, k: slice = k, seen: Tensor = seen, length: int = length, keys: int = keys):
            part = slice(k.start + b.start, k.start + b.stop)
            part_scale = None if key_scale is None else key_scale[part]
            mask = (b.start, keys - length) if causal else None
            plain = _logits(query[q], key[part], None, scale, mask)
            logits = plain if part_scale is None else plain * part_scale.to(dtype)
            p = (logits - lse[:, q, None]).exp().flatten(0, 1)
            return plain.flatten(0, 1), torch.where(seen, p, 0)

        def weighted(b: slice, p: Tensor, g: Tensor = g, row: Tensor | None = row) -> Tensor:
            if row is None:
                return p * (g[b] / p.shape[0])
            picked = torch.zeros_like(p)
            index = row[b][None]
            return picked.scatter_(0, index, p.gather(0, index) * g[b])

        blocks = [slice(s, min(s + block, keys)) for s in range(0, keys, block)]
        c = torch.zeros(heads * length, 1, dtype=dtype, device=query.device)
        for b in blocks:
            c += weighted(b, weights(b)[1]).sum(1, keepdim=True)
        for b in blocks:
            plain, p = weights(b)
            d = weighted(b, p) - p * c
            part = slice(k.start + b.start, k.start + b.stop)
            if key_scale is not None:
                grad_scale[part] = torch.where(d == 0, 0, d * plain).sum(0)
                d = d * key_scale[part].to(dtype)
            d = (d * scale).view(kv_heads, group * length, -1)
            folded = query[q].to(dtype).transpose(0, 1).reshape(kv_heads, group * length, head_dim)
            grad_key[part] = (d.transpose(1, 2) @ folded).transpose(0, 1)
            step = d @ key[part].to(dtype).transpose(0, 1)
            grad_query[q] += step.view(heads, length, head_dim).transpose(0, 1)
    if key_scale is not None:
        grad_scale = grad_scale.to(key_scale.dtype)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_scale


def segments(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, column_start: Tensor | None, cu_columns: Tensor | None):
    """For each segment: its slice of the queries, of the keys, the wanted columns within the keys, and their slice of
    the output."""
    q, k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    start = [0] * (len(q) - 1) if column_start is None else column_start.tolist()
    out = k if cu_columns is None else cu_columns.tolist()
    for s in range(len(q) - 1):
        width = out[s + 1] - out[s]
        yield (
            slice(q[s], q[s + 1]),
            slice(k[s], k[s + 1]),
            slice(start[s], start[s] + width),
            slice(out[s], out[s + 1]),
        )


def segment_logits(query: Tensor, key: Tensor, key_scale: Tensor | None, scale: float, causal: bool) -> Tensor:
    """[L, H, Dh] x [M, Hkv, Dh] -> logits [H, L, M] of one segment; -inf where ``causal`` hides the key."""
    return _logits(query, key, key_scale, scale, (0, key.shape[0] - query.shape[0]) if causal else None)


def _logits(
    query: Tensor, key: Tensor, key_scale: Tensor | None, scale: float, causal: tuple[int, int] | None
) -> Tensor:
    # causal = (index of the first key here, M - L): row l sees key m when m <= l + M - L.
    dtype = statistics_dtype(query)
    heads, kv_heads = query.shape[1], key.shape[1]
    folded = query.to(dtype).transpose(0, 1).reshape(kv_heads, -1, query.shape[2])
    logits = (folded @ key.to(dtype).permute(1, 2, 0)).view(heads, query.shape[0], key.shape[0]) * scale
    if key_scale is not None:
        logits = logits * key_scale.to(dtype)
    if causal is not None:
        first, shift = causal
        row = torch.arange(query.shape[0], device=query.device)[:, None]
        column = torch.arange(first, first + key.shape[0], device=query.device)
        logits = logits.masked_fill(column > row + shift, -torch.inf)
    return logits
