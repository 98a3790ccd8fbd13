"""Query-to-vision relevance."""

from collections.abc import Sequence

import torch
from torch import Tensor

import qts_kernels.ops.relevance.register  # noqa: F401
from qts_kernels._checks import check_cu_seqlens, check_same, check_same_segments, check_shape, check_tensor
from qts_kernels._segments import uniform_cu_seqlens

Columns = tuple[int, int] | Sequence[tuple[int, int]]


def relevance(
    query: Tensor,
    key: Tensor,
    *,
    reduce: str = "max",
    scale: float | None = None,
    key_scale: Tensor | None = None,
    causal: bool = False,
    columns: Columns | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    r"""How much the question attends to each key: attention weights, reduced over heads and query tokens.

    .. math::
        s_{hlm} = \mathrm{scale} \cdot \mathrm{key\_scale}_m \, \langle q_{lh}, k_{m, \lfloor h/G \rfloor} \rangle, \\
        p_{hl\cdot} = \mathrm{softmax}_m(s_{hl\cdot}), \quad
        r_m = \max_{h,l} p_{hlm} \ \text{or} \ \tfrac{1}{HL} \textstyle\sum_{h,l} p_{hlm}

    with G = H / Hkv. This is the relevance of QTSplus (arXiv 2511.11910: max, no position encoding) and of FlexSelect
    (arXiv 2506.00993: ``causal=True`` and ``columns``, on rotated q and k). The attention matrix is never stored.

    Args:
        query: [B, L, H, Dh], or [sum L, H, Dh] with ``cu_seqlens_q``. float32, bfloat16, float16
            (float64 for checking: slow).
        key: [B, M, Hkv, Dh], or [sum M, Hkv, Dh] with ``cu_seqlens_k``; H a multiple of Hkv; dtype of ``query``.
        reduce: "max" or "mean" over heads and query tokens.
        scale: factor of every logit; None means Dh ** -0.5.
        key_scale: fp32 [B, M] or [sum M], factor of each key's logits (``rms_scale`` of the raw tokens folds their
            RMSNorm in here).
        causal: query l of L sees key m of M only when m <= l + M - L: the last query is aligned with the last key.
        columns: return only the scores of keys start..stop-1 of each segment: (start, stop), or one pair a segment
            (pairs are copied from the host, so make them outside of CUDA-graph capture). The softmax still runs over
            every key.
        cu_seqlens_q, cu_seqlens_k: int32 [S+1] offsets of the packed segments; both or neither.

    Returns:
        fp32 scores in [0, 1] (float64 for float64 input): [B, M] or [sum M]; with ``columns`` [B, C] or [sum C].
        A key that no query sees scores 0, and so does every key of a segment that has no query. NaN in a segment's
        query or key propagates to the scores it touches.

    Raises:
        ValueError, TypeError: on shapes, heads, dtypes, devices, columns or cu_seqlens that do not fit, saying what
            was expected and what came.

    Differentiable in query, key and key_scale; the backward pass recomputes the weights. With ``reduce="max"`` the
    gradient of a key goes to one row that attains its maximum.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check(query, key, reduce, key_scale, cu_seqlens_q, cu_seqlens_k, packed)
    if packed:
        segments, length = cu_seqlens_k.shape[0] - 1, None
    else:
        segments, length = key.shape[:2]
        cu_seqlens_q = uniform_cu_seqlens(segments, query.shape[1], query.device)
        cu_seqlens_k = uniform_cu_seqlens(segments, length, query.device)
        query, key = query.flatten(0, 1), key.flatten(0, 1)
        key_scale = None if key_scale is None else key_scale.flatten()
    column_start, cu_columns, total = _columns(columns, segments, length, cu_seqlens_k, key.shape[0])
    with_argrow = (
        reduce == "max"
        and torch.is_grad_enabled()
        and (query.requires_grad or key.requires_grad or (key_scale is not None and key_scale.requires_grad))
    )
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    scores, _, _ = torch.ops.qts_kernels.relevance(
        query,
        key,
        key_scale,
        cu_seqlens_q,
        cu_seqlens_k,
        column_start,
        cu_columns,
        total,
        reduce,
        scale,
        causal,
        with_argrow,
    )
    return scores if packed else scores.view(segments, total // segments if segments else 0)


def _check(query, key, reduce, key_scale, cu_seqlens_q, cu_seqlens_k, packed) -> None:
    if packed and (cu_seqlens_q is None or cu_seqlens_k is None):
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"packed input needs cu_seqlens_q and cu_seqlens_k, got no {missing}")
    check_tensor("query", query, 3 if packed else 4, "[sum L, H, Dh]" if packed else "[B, L, H, Dh]")
    check_tensor("key", key, 3 if packed else 4, "[sum M, Hkv, Dh]" if packed else "[B, M, Hkv, Dh]")
    check_same("key", key, "query", query)
    if reduce not in ("max", "mean"):
        raise ValueError(f"reduce must be 'max' or 'mean', got {reduce!r}")
    if not packed and key.shape[0] != query.shape[0]:
        raise ValueError(f"query and key must have the same batch, got {query.shape[0]} and {key.shape[0]}")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"the query's heads must be a positive multiple of the key's, got {heads} and {kv_heads}")
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        raise ValueError(
            f"query and key must have the same head size, at least 1, got {query.shape[-1]} and {key.shape[-1]}"
        )
    if packed:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "query", query)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "query", query)
        check_same_segments("cu_seqlens_q", cu_seqlens_q, "cu_seqlens_k", cu_seqlens_k)
    if key_scale is not None:
        expected = (torch.float64,) if query.dtype == torch.float64 else (torch.float32,)
        check_tensor("key_scale", key_scale, key.ndim - 2, "[sum M]" if packed else "[B, M]", expected)
        check_shape("key_scale", key_scale, key.shape[:-2], "[sum M]" if packed else "[B, M]")
        check_same("key_scale", key_scale, "query", query, dtype=False)


def _columns(columns, segments: int, length: int | None, cu_seqlens_k: Tensor, total: int):
    """column_start, cu_columns and the number of wanted columns; (None, None, every key) where ``columns`` is None."""
    if columns is None:
        return None, None, total
    device = cu_seqlens_k.device
    one_pair = len(columns) == 2 and all(isinstance(c, int) for c in columns)
    pairs = [columns] if one_pair else list(columns)
    if not one_pair and len(pairs) != segments:
        raise ValueError(
            f"columns must be (start, stop) or one pair for each of {segments} segments, got {len(pairs)} pairs"
        )
    lengths = [length] * len(pairs)
    if length is None and device.type == "cpu" and not torch.compiler.is_compiling():
        lengths = cu_seqlens_k.diff().tolist()
        pairs = pairs * segments if one_pair else pairs
    for (start, stop), available in zip(pairs, lengths, strict=True):
        if start < 0 or stop < start or (available is not None and stop > available):
            bound = "the segment's length" if available is None else available
            raise ValueError(f"columns must satisfy 0 <= start <= stop <= {bound}, got ({start}, {stop})")
    if one_pair:
        start, stop = columns
        return (
            torch.full((segments,), start, dtype=torch.int32, device=device),
            uniform_cu_seqlens(segments, stop - start, device),
            segments * (stop - start),
        )
    widths = [stop - start for start, stop in pairs]
    if length is not None and len(set(widths)) > 1:
        raise ValueError(
            f"columns of a dense batch must all have one width, got {sorted(set(widths))}; "
            "pack the batch with cu_seqlens"
        )
    starts = torch.tensor([start for start, _ in pairs], dtype=torch.int32, device=device)
    cu_columns = torch.tensor([0, *widths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
    return starts, cu_columns, sum(widths)
