"""Relevance in three launches, none of which stores the attention matrix.

1. Row statistics: maximum and sum of exponentials of each row over a chunk of keys, keys split so that the card is
   full at 64 tokens.
2. Their combination, log-sum-exp of each row; and a copy of the query in the order in which pass 3 reads it.
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
)
from qts_kernels.ops.relevance.triton_backward import relevance_backward
from qts_kernels.ops.relevance.triton_tiles import (
    LN_2,
    LOG2_E,
    PACKED,
    copy_rows,
    key_block,
    key_tiles,
    packed_block,
    packed_rows,
    packed_start,
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
    """Take one tile of keys into each row's running maximum, of logits over ``factor``, and sum of exponentials."""
    key, position, offset = key_block(key, start, last, key_stride, MASKED, BLOCK_KEYS)
    logits = product(query_tile, query, query_offsets, key, offset * key_stride, HEAD_DIM, DEPTH, PRECISION)
    if HAS_SCALE:
        logits *= tl.load(key_scale + start + offset)[None, :]
    if MASKED:
        visible = (position < end)[None, :]
        if CAUSAL:
            visible = visible & (position[None, :] <= token[:, None] + shift)
        logits = tl.where(visible, logits, -float("inf"))
    highest = tl.maximum(maximum, tl.max(logits, 1))
    reference = tl.where(tl.abs(highest) == float("inf"), 0.0, highest) * factor
    # The factor rides on the subtraction: one instruction a logit less than scaling them first.
    weights = tl.exp2(logits * factor - reference[:, None])
    return highest, total * tl.exp2(maximum * factor - reference) + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["rows", "keys", "segments", "slots"])
def _row_statistics(
    query, key, key_scale, cu_seqlens_q, cu_seqlens_k, maxima, totals,
    rows, keys, segments, chunk, slots, packed_rows, factor, query_stride, query_head_stride, key_stride,
    key_head_stride, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_SCALE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """maxima, totals [split, KV, packed rows], in base 2, of the keys of one chunk. Programs that share a chunk are
    neighbours."""
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
        target = (split * KV_HEADS + kv_head).to(tl.int64) * packed_rows
        target += packed_start(first_row, segment, GROUP, PACKED)
        for tile in range(slot, tl.cdiv(length * GROUP, BLOCK_ROWS), slots):
            row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            token, head = row_heads(row, length, GROUP)
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
            tl.store(maxima + target + row, maximum * factor, mask=row < length * GROUP)
            tl.store(totals + target + row, total, mask=row < length * GROUP)


@triton.jit(do_not_specialize=["rows", "keys", "segments", "chunk"])
def _combine_statistics(
    query, maxima, totals, cu_seqlens_q, cu_seqlens_k, lse, packed_query, denominator,
    rows, keys, segments, chunk, packed_rows, query_stride, query_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """From the statistics of the chunks lse [H, Tq] and, packed and in base 2, what the scores' logits are taken less;
    and the packed copy of the query."""
    segment, first_row, length, kv_head, row, packed = packed_block(
        cu_seqlens_q, rows, segments, packed_rows, GROUP, KV_HEADS, PACKED, BLOCK_ROWS
    )
    _, available = segment_bounds(cu_seqlens_k, segment, keys)
    splits = tl.cdiv(available, chunk)
    inside = row < length * GROUP
    stride = packed_rows.to(tl.int64) * KV_HEADS
    maximum = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        source = split[:, None] * stride + packed[None, :]
        known = (split < splits)[:, None] & inside[None, :]
        maximum = tl.maximum(maximum, tl.max(tl.load(maxima + source, mask=known, other=-float("inf")), 0))
    reference = tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for first in range(0, splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        source = split[:, None] * stride + packed[None, :]
        known = (split < splits)[:, None] & inside[None, :]
        values = tl.load(maxima + source, mask=known, other=-float("inf"))
        total += tl.sum(tl.load(totals + source, mask=known, other=0) * tl.exp2(values - reference[None, :]), 0)
    result = reference + tl.log2(total)
    token, head = row_heads(row, tl.maximum(length, 1), GROUP)
    head += kv_head * GROUP
    tl.store(lse + head.to(tl.int64) * rows + first_row + token, result * _LN_2, mask=inside)
    # For the weights: a row that sees no key, and one behind the last, gets +inf, which makes each of its weights 0.
    result = tl.where(result == float("inf"), _HUGE, result)
    tl.store(denominator + packed, tl.where(result == -float("inf"), float("inf"), result))
    source = (first_row + token).to(tl.int64) * query_stride + head.to(tl.int64) * query_head_stride
    copy_rows(query, source, packed_query, packed * HEAD_DIM, length > 0, HEAD_DIM, DEPTH)


@triton.jit
def _reduce_rows(
    query, key, denominator, key_offsets, position, scale, length, start, packed_rows, kv_heads, shift,
    key_head_stride, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, MEAN: tl.constexpr,
    ARGROW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """Over all rows of a segment, the weights of a tile of keys: their maximum (log2), the first row (h * L + l) that
    attains it, their sum, and whether any row's lse is NaN."""
    best = tl.full([BLOCK_KEYS], -float("inf"), tl.float32)
    best_row = tl.zeros([BLOCK_KEYS], tl.int32)
    total = tl.zeros([BLOCK_KEYS], tl.float32)
    broken = tl.zeros([BLOCK_ROWS], tl.int32)
    lane = tl.arange(0, BLOCK_ROWS)
    for kv_head in range(0, kv_heads):
        key_head = key + tl.cast(kv_head, tl.int64) * key_head_stride
        key_tile = stationary_tile(key_head, key_offsets, HEAD_DIM, DEPTH)
        head_start = tl.cast(kv_head, tl.int64) * packed_rows + start
        for first in range(0, length * GROUP, BLOCK_ROWS):
            at = head_start + first
            norm = tl.load(denominator + at + lane)
            broken |= (norm != norm).to(tl.int32)
            tile = query + at * HEAD_DIM
            logits = product(key_tile, key_head, key_offsets, tile, lane * HEAD_DIM, HEAD_DIM, DEPTH, PRECISION)
            weight = logits * scale[:, None] - norm[None, :]  # log2 of it
            if MASKED:
                token = (first + lane) % length
                weight = tl.where(position[:, None] <= token[None, :] + shift, weight, -float("inf"))
            if MEAN:
                total += tl.sum(tl.exp2(weight), 1)
            else:
                highest = tl.max(weight, 1)
                if ARGROW:
                    number = kv_head * GROUP * length + first + lane
                    lowest = tl.min(tl.where(weight == highest[:, None], number[None, :], 2147483647), 1)
                    best_row = tl.where(highest > best, lowest, best_row)
                best = tl.maximum(best, highest)
    return best, best_row, total, tl.max(broken, 0)


@triton.jit(do_not_specialize=["rows", "keys", "columns", "segments"])
def _scores(
    query, key, key_scale, cu_seqlens_q, cu_seqlens_k, column_start, cu_columns, denominator, scores, argrow,
    rows, keys, columns, segments, packed_rows, factor, key_stride, key_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_START: tl.constexpr, MEAN: tl.constexpr, ARGROW: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
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
        begin = first
        if HAS_START:
            begin += tl.load(column_start + segment)
        position = begin + tl.arange(0, BLOCK_KEYS)
        live = (length > 0) & (available > 0)  # else every score is 0 and there is nothing to read
        index = first_key.to(tl.int64) + tl.minimum(tl.maximum(position, 0), available - 1)
        scale = tl.full([BLOCK_KEYS], factor, tl.float32)
        if HAS_SCALE:
            scale *= tl.load(key_scale + index, mask=live, other=0)
        offsets = index * key_stride
        shift = available - length
        start = packed_start(first_row, segment, GROUP, PACKED)
        heads = tl.where(live, KV_HEADS, 0)
        if CAUSAL and begin + BLOCK_KEYS - 1 > shift:  # some row does not see the last key
            best, best_row, total, broken = _reduce_rows(
                query, key, denominator, offsets, position, scale, length, start, packed_rows, heads, shift,
                key_head_stride, GROUP, HEAD_DIM, True, MEAN, ARGROW, PRECISION, BLOCK_ROWS, BLOCK_KEYS, DEPTH,
            )  # fmt: skip
        else:
            best, best_row, total, broken = _reduce_rows(
                query, key, denominator, offsets, position, scale, length, start, packed_rows, heads, shift,
                key_head_stride, GROUP, HEAD_DIM, False, MEAN, ARGROW, PRECISION, BLOCK_ROWS, BLOCK_KEYS, DEPTH,
            )  # fmt: skip
        if MEAN:
            result = total / tl.maximum(length * GROUP * KV_HEADS, 1).to(tl.float32)
        else:
            result = tl.exp2(best)
        result = tl.where((result == float("inf")) | (broken > 0), float("nan"), result)
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
    argrow = query.new_empty(total_columns if with_argrow else 0, dtype=torch.int64)
    if scale <= 0:  # maxima are taken before the logits are scaled
        query, scale = (-query, -scale) if scale < 0 else (query * 0, 1.0)
    query, key = unit_stride(query), unit_stride(key)
    key_scale = None if key_scale is None else key_scale.contiguous()
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    packed = packed_rows(query, kv_heads, segments)
    packed_query = query.new_empty(kv_heads, packed, head_dim)
    denominator = query.new_empty(kv_heads, packed, dtype=torch.float32)
    rows_a_segment = triton.cdiv(rows, segments) * (heads // kv_heads)
    row_tile, key_tile = row_tiles(query, rows_a_segment), key_tiles(query, rows_a_segment)
    splits = split_keys(query, key, segments, row_tile, bytes_a_row=8)
    query_strides, key_strides = (query.stride(0), query.stride(1)), (key.stride(0), key.stride(1))
    heads_of = {"GROUP": heads // kv_heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "PACKED": PACKED}
    shared = {**heads_of, "CAUSAL": causal, "HAS_SCALE": key_scale is not None, "PRECISION": precision(query)}
    factor = scale * LOG2_E
    with on_device_of(query):
        if rows:
            maxima = query.new_empty(splits.most, kv_heads, packed, dtype=torch.float32)
            totals = torch.empty_like(maxima)
            _row_statistics[(splits.blocks * kv_heads * splits.slots,)](
                query, key, key_scale, cu_seqlens_q, cu_seqlens_k, maxima, totals,
                rows, keys, segments, splits.chunk, splits.slots, packed, factor, *query_strides, *key_strides,
                **shared, **row_tile.constants(),
            )  # fmt: skip
            _combine_statistics[(packed // 32 * kv_heads,)](
                query, maxima, totals, cu_seqlens_q, cu_seqlens_k, lse, packed_query, denominator,
                rows, keys, segments, splits.chunk, packed, *query_strides, **heads_of,
                BLOCK_ROWS=32, BLOCK_SPLITS=min(64, triton.next_power_of_2(splits.most)), DEPTH=row_tile.depth,
                num_warps=4,
            )  # fmt: skip
        if total_columns:
            _scores[(blocks_of(total_columns, segments, key_tile.keys),)](
                packed_query, key, key_scale, cu_seqlens_q, cu_seqlens_k, column_start,
                cu_seqlens_k if cu_columns is None else cu_columns, denominator, scores, argrow,
                rows, keys, total_columns, segments, packed, factor, *key_strides,
                HAS_START=column_start is not None, MEAN=reduce == "mean", ARGROW=with_argrow,
                **shared, **key_tile.constants(),
            )  # fmt: skip
    return scores, lse, argrow
