"""Relevance in three launches, none of which stores the attention matrix.

1. Row statistics: maximum and sum of exponentials of each row over a chunk of keys, keys split so that the card is
   full at 64 tokens.
2. Their combination, log-sum-exp of each row.
3. Key-major: each program owns a block of keys, computes its logits again for all heads and rows, and reduces them. In
   max mode that needs one exponential a key, for max(exp(s - lse)) = exp(max(s - lse)).

No atomics; statistics are fp32.

A row whose lse is NaN makes its segment's scores NaN; one that sees no key takes part in nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops._triton_common import (
    blocks_of,
    check_dtype,
    on_device_of,
    segment_bounds,
    segment_of_block,
    segment_of_rows,
)
from qts_kernels.ops.relevance.triton_backward import relevance_backward
from qts_kernels.ops.relevance.triton_tiles import (
    LN_2,
    LOG2_E,
    key_tiles,
    precision,
    product,
    row_heads,
    row_tiles,
    split_keys,
    stationary_tile,
    unit_stride,
)

__all__ = ["relevance", "relevance_backward"]

_LN_2 = tl.constexpr(LN_2)
# Stands for lse = +inf: a logit of +inf less this is still +inf, any other -inf enough for a weight of 0.
_HUGE = tl.constexpr(3e38)


@triton.jit
def _see(
    maximum, total, query_tile, query, query_offsets, token, key, key_scale, start, end, last, shift, factor,
    key_stride, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, HAS_SCALE: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running maximum and sum of exponentials of each row (base 2)."""
    position = start + tl.arange(0, BLOCK_KEYS)
    index = tl.minimum(position, last).to(tl.int64)
    logits = product(query_tile, query, query_offsets, key, index * key_stride, HEAD_DIM, DEPTH, PRECISION)
    if HAS_SCALE:
        logits *= (tl.load(key_scale + index) * factor)[None, :]
    else:
        logits *= factor
    if MASKED:
        visible = (position < end)[None, :]
        if CAUSAL:
            visible = visible & (position[None, :] <= token[:, None] + shift)
        logits = tl.where(visible, logits, -float("inf"))
    highest = tl.maximum(maximum, tl.max(logits, 1))
    reference = tl.where(tl.abs(highest) == float("inf"), 0.0, highest)
    total = total * tl.exp2(maximum - reference) + tl.sum(tl.exp2(logits - reference[:, None]), 1)
    return highest, total


@triton.jit(do_not_specialize=["rows", "keys", "segments", "slots"])
def _row_statistics(
    query, key, key_scale, cu_seqlens_q, cu_seqlens_k, maxima, totals,
    rows, keys, segments, chunk, slots, factor, query_stride, query_head_stride, key_stride, key_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, HAS_SCALE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """maxima, totals [split, H, Tq] of the keys of one chunk. Programs that share a chunk are neighbours."""
    program = tl.program_id(0)
    slot = program % slots
    kv_head = program // slots % KV_HEADS
    block = program // (slots * KV_HEADS)
    segment = segment_of_block(cu_seqlens_k, segments, block, chunk)
    first_row, length = segment_bounds(cu_seqlens_q, segment, rows)
    first_key, available = segment_bounds(cu_seqlens_k, segment, keys)
    split = block - first_key // chunk - segment
    begin = split * chunk
    if (begin >= 0) & (begin < available):
        end = tl.minimum(begin + chunk, available)
        shift = available - length
        everyone = end
        if CAUSAL:
            everyone = tl.minimum(end, shift + 1)  # the keys that every row sees
        unmasked = begin + tl.maximum(everyone - begin, 0) // BLOCK_KEYS * BLOCK_KEYS
        query += kv_head.to(tl.int64) * GROUP * query_head_stride
        key += first_key.to(tl.int64) * key_stride + kv_head.to(tl.int64) * key_head_stride
        if HAS_SCALE:
            key_scale += first_key
        for tile in range(slot, tl.cdiv(length * GROUP, BLOCK_ROWS), slots):
            token, head = row_heads(tile, length * GROUP, GROUP, BLOCK_ROWS)
            offsets = (first_row + token).to(tl.int64) * query_stride + head.to(tl.int64) * query_head_stride
            query_tile = stationary_tile(query, offsets, HEAD_DIM, DEPTH)
            maximum = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            for start in range(begin, unmasked, BLOCK_KEYS):
                maximum, total = _see(
                    maximum, total, query_tile, query, offsets, token, key, key_scale, start, end, available - 1,
                    shift, factor, key_stride, HEAD_DIM, DEPTH, PRECISION, HAS_SCALE, CAUSAL, False, BLOCK_KEYS,
                )  # fmt: skip
            for start in range(unmasked, end, BLOCK_KEYS):
                maximum, total = _see(
                    maximum, total, query_tile, query, offsets, token, key, key_scale, start, end, available - 1,
                    shift, factor, key_stride, HEAD_DIM, DEPTH, PRECISION, HAS_SCALE, CAUSAL, True, BLOCK_KEYS,
                )  # fmt: skip
            inside = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < length * GROUP
            target = (split * KV_HEADS + kv_head).to(tl.int64) * GROUP + head
            target = target * rows + first_row + token
            tl.store(maxima + target, maximum, mask=inside)
            tl.store(totals + target, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "keys", "segments", "chunk", "heads"])
def _combine_statistics(
    maxima, totals, cu_seqlens_q, cu_seqlens_k, lse, denominator, rows, keys, segments, chunk, heads,
    BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """lse [H, Tq] and, in base 2, what the scores' logits are taken less, from the statistics of the chunks."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    every = heads.to(tl.int64) * rows
    inside = row < every
    segment = segment_of_rows(cu_seqlens_q, segments, (row % rows).to(tl.int32))
    _, available = segment_bounds(cu_seqlens_k, segment, keys)
    splits = tl.where(inside, tl.cdiv(available, chunk), 0)
    most = tl.max(splits, 0)
    maximum = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    for first in range(0, most, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        source = split[:, None] * every + row[None, :]
        values = tl.load(maxima + source, mask=split[:, None] < splits[None, :], other=-float("inf"))
        maximum = tl.maximum(maximum, tl.max(values, 0))
    reference = tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, most, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        source = split[:, None] * every + row[None, :]
        known = split[:, None] < splits[None, :]
        values = tl.load(maxima + source, mask=known, other=-float("inf"))
        total += tl.sum(tl.load(totals + source, mask=known, other=0) * tl.exp2(values - reference[None, :]), 0)
    result = reference + tl.log2(total)
    tl.store(lse + row, result * _LN_2, mask=inside)
    # For the weights: a row that sees no key gets +inf, which makes each of its weights 0.
    result = tl.where(result == float("inf"), _HUGE, result)
    tl.store(denominator + row, tl.where(result == -float("inf"), float("inf"), result), mask=inside)


@triton.jit(do_not_specialize=["rows", "keys", "columns", "segments"])
def _scores(
    query, key, key_scale, cu_seqlens_q, cu_seqlens_k, column_start, cu_columns, denominator, scores, argrow,
    rows, keys, columns, segments, factor, query_stride, query_head_stride, key_stride, key_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_START: tl.constexpr, MEAN: tl.constexpr, ARGROW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """scores (and argrow) of a block of keys: logits [keys, rows] of all heads and rows, reduced along the rows."""
    block = tl.program_id(0)
    segment = segment_of_block(cu_columns, segments, block, BLOCK_KEYS)
    first_row, length = segment_bounds(cu_seqlens_q, segment, rows)
    first_key, available = segment_bounds(cu_seqlens_k, segment, keys)
    first_column, wanted = segment_bounds(cu_columns, segment, columns)
    first = (block - first_column // BLOCK_KEYS - segment) * BLOCK_KEYS
    if (first >= 0) & (first < wanted):
        column = first + tl.arange(0, BLOCK_KEYS)
        position = column
        if HAS_START:
            position += tl.load(column_start + segment)
        live = (length > 0) & (available > 0)  # else every score is 0 and there is nothing to read
        index = first_key.to(tl.int64) + tl.minimum(tl.maximum(position, 0), available - 1)
        scale = tl.full([BLOCK_KEYS], factor, tl.float32)
        if HAS_SCALE:
            scale *= tl.load(key_scale + index, mask=live, other=0)
        shift = available - length
        best = tl.full([BLOCK_KEYS], -float("inf"), tl.float32)
        best_row = tl.zeros([BLOCK_KEYS], tl.int32)  # head * length + token
        total = tl.zeros([BLOCK_KEYS], tl.float32)
        broken = tl.zeros([BLOCK_ROWS], tl.int32)
        for kv_head in range(0, tl.where(live, KV_HEADS, 0)):
            heads_before = kv_head * GROUP
            group = query + tl.cast(heads_before, tl.int64) * query_head_stride
            key_head = key + tl.cast(kv_head, tl.int64) * key_head_stride
            key_offsets = index * key_stride
            key_tile = stationary_tile(key_head, key_offsets, HEAD_DIM, DEPTH)
            for tile in range(0, tl.cdiv(length * GROUP, BLOCK_ROWS)):
                token, head = row_heads(tile, length * GROUP, GROUP, BLOCK_ROWS)
                offsets = (first_row + token).to(tl.int64) * query_stride + head.to(tl.int64) * query_head_stride
                norm = tl.load(denominator + (heads_before + head).to(tl.int64) * rows + first_row + token)
                broken |= (norm != norm).to(tl.int32)
                logits = product(key_tile, key_head, key_offsets, group, offsets, HEAD_DIM, DEPTH, PRECISION)
                weight = logits * scale[:, None] - norm[None, :]  # log2 of it
                if CAUSAL:
                    weight = tl.where(position[:, None] <= token[None, :] + shift, weight, -float("inf"))
                if MEAN:
                    inside = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < length * GROUP
                    total += tl.sum(tl.where(inside[None, :], tl.exp2(weight), 0.0), 1)
                else:
                    highest = tl.max(weight, 1)
                    if ARGROW:
                        number = (heads_before + head) * length + token
                        lowest = tl.min(tl.where(weight == highest[:, None], number[None, :], 2147483647), 1)
                        better = (highest > best) | ((highest == best) & (lowest < best_row))
                        best_row = tl.where(better, lowest, best_row)
                    best = tl.maximum(best, highest)
        if MEAN:
            result = total / tl.maximum(length * GROUP * KV_HEADS, 1).to(tl.float32)
        else:
            result = tl.exp2(best)
        result = tl.where((result == float("inf")) | (tl.max(broken, 0) > 0), float("nan"), result)
        tl.store(scores + first_column + column, result, mask=column < wanted)
        if ARGROW:
            divisor = tl.maximum(length, 1)
            row = (best_row // divisor).to(tl.int64) * rows + first_row + best_row % divisor
            tl.store(argrow + first_column + column, tl.where(live, row, 0), mask=column < wanted)


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
    check_dtype("query", query)
    (rows, heads, head_dim), (keys, kv_heads, _) = query.shape, key.shape
    segments = cu_seqlens_k.shape[0] - 1
    with_argrow = with_argrow and reduce == "max"
    scores = query.new_empty(total_columns, dtype=torch.float32)
    lse = query.new_empty(heads, rows, dtype=torch.float32)
    denominator = torch.empty_like(lse)
    argrow = query.new_empty(total_columns if with_argrow else 0, dtype=torch.int64)
    query, key = unit_stride(query), unit_stride(key)
    key_scale = None if key_scale is None else key_scale.contiguous()
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    packed_rows = triton.cdiv(rows, segments) * (heads // kv_heads)
    row_tile, key_tile = row_tiles(query, packed_rows), key_tiles(query, packed_rows)
    splits = split_keys(query, key, segments, row_tile, bytes_a_row=8)
    strides = (query.stride(0), query.stride(1), key.stride(0), key.stride(1))
    shared = {
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "CAUSAL": causal,
        "HAS_SCALE": key_scale is not None,
        "PRECISION": precision(query),
    }
    factor = scale * LOG2_E
    with on_device_of(query):
        if rows:
            maxima = query.new_empty(splits.most, heads, rows, dtype=torch.float32)
            totals = torch.empty_like(maxima)
            _row_statistics[(splits.blocks * kv_heads * splits.slots,)](
                query, key, key_scale, cu_seqlens_q, cu_seqlens_k, maxima, totals,
                rows, keys, segments, splits.chunk, splits.slots, factor, *strides, **shared, **row_tile.constants(),
            )  # fmt: skip
            _combine_statistics[(triton.cdiv(heads * rows, 32),)](
                maxima, totals, cu_seqlens_q, cu_seqlens_k, lse, denominator, rows, keys, segments, splits.chunk, heads,
                BLOCK_ROWS=32, BLOCK_SPLITS=min(64, triton.next_power_of_2(splits.most)), num_warps=4,
            )  # fmt: skip
        if total_columns:
            _scores[(blocks_of(total_columns, segments, key_tile.keys),)](
                query, key, key_scale, cu_seqlens_q, cu_seqlens_k, column_start,
                cu_seqlens_k if cu_columns is None else cu_columns, denominator, scores, argrow,
                rows, keys, total_columns, segments, factor, *strides,
                HAS_START=column_start is not None, MEAN=reduce == "mean", ARGROW=with_argrow,
                **shared, **key_tile.constants(),
            )  # fmt: skip
    return scores, lse, argrow
