"""The gradients of relevance, recomputing the weights: nothing of size H x L x M is stored, and there are no atomics.

With g the gradient of the scores, p the weights and w = d score / d p (see the reference),
    d logit[r, m] = p[r, m] (w[r, m] g[m] - c[r]),  c[r] = sum_m w[r, m] g[m] p[r, m].

1. c: in max mode a sum of g * score over the keys whose maximum row r attains; in mean mode a pass over the logits.
2. Key-major: each program owns a block of keys and adds up their gradients over all heads and rows.
3. Row-major: each program adds up the gradients of a tile of rows over a chunk of keys; then the chunks are added up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops._triton_common import (
    blocks_of,
    check_dtype,
    is_amd,
    multiprocessors,
    on_device_of,
    segment_bounds,
    segment_of_block,
)
from qts_kernels.ops.relevance.triton_tiles import (
    LOG2_E,
    PACKED,
    copy_rows,
    gradient_tiles,
    key_block,
    load_tile,
    packed_block,
    packed_rows,
    packed_start,
    precision,
    product,
    row_heads,
    split_keys,
    stationary_tile,
    unit_stride,
)

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _add_product(d, tile, sums, WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr):
    """sums + d @ tile. d keeps 16 bits of its mantissa where the tile is bf16: rounded to 8, it alone would spend the
    error budget. Its upper half is cut, not rounded: what is left is exact, and a mask is cheaper than a conversion."""
    if WIDE.is_bf16():
        high = (d.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        sums = tl.dot(high.to(tl.bfloat16), tile, sums)
        return tl.dot((d - high).to(tl.bfloat16), tile, sums)
    else:
        return tl.dot(d, tile.to(WIDE), sums, input_precision=WIDE_PRECISION)


@triton.jit(do_not_specialize=["rows", "keys", "columns", "segments"])
def _spread(
    grad, scores, argrow, cu_seqlens_q, cu_seqlens_k, column_start, cu_columns, g, attains, picked,
    rows, keys, columns, segments, HAS_START: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each key: g, 0 where its score is not wanted; in max mode the row (head * length + token) that attains its
    maximum, -1 where it is not wanted, and g * score."""
    block = tl.program_id(0)
    segment = segment_of_block(cu_seqlens_k, segments, block, BLOCK)
    first_row, length = segment_bounds(cu_seqlens_q, segment, rows)
    first_key, available = segment_bounds(cu_seqlens_k, segment, keys)
    first_column, wanted = segment_bounds(cu_columns, segment, columns)
    first = (block - first_key // BLOCK - segment) * BLOCK
    if (first >= 0) & (first < available):
        position = first + tl.arange(0, BLOCK)
        column = position
        if HAS_START:
            column -= tl.load(column_start + segment)
        known = (column >= 0) & (column < wanted) & (position < available)
        value = tl.load(grad + first_column + column, mask=known, other=0)
        tl.store(g + first_key + position, value, mask=position < available)
        if not MEAN:
            row = tl.load(argrow + first_column + column, mask=known, other=0)
            number = (row // rows).to(tl.int32) * length + (row % rows).to(tl.int32) - first_row
            tl.store(attains + first_key + position, tl.where(known, number, -1), mask=position < available)
            value *= tl.load(scores + first_column + column, mask=known, other=0)
            tl.store(picked + first_key + position, value, mask=position < available)


@triton.jit(do_not_specialize=["rows", "segments"])
def _pack(
    query, lse, cu_seqlens_q, packed_query, packed_lse, rows, segments, packed_rows, query_stride, query_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Packed copies of the query and, in base 2, of lse: +inf, a weight of 0, where a row sees no key or is none."""
    _, first_row, length, kv_head, row, packed = packed_block(
        cu_seqlens_q, rows, segments, packed_rows, GROUP, KV_HEADS, PACKED, BLOCK_ROWS
    )
    token, head = row_heads(row, tl.maximum(length, 1), GROUP)
    head += kv_head * GROUP
    inside = row < length * GROUP
    value = tl.load(lse + head.to(tl.int64) * rows + first_row + token, mask=inside, other=-float("inf"))
    tl.store(packed_lse + packed, tl.where(value == -float("inf"), float("inf"), value * _LOG2_E))
    source = (first_row + token).to(tl.int64) * query_stride + head.to(tl.int64) * query_head_stride
    copy_rows(query, source, packed_query, packed * HEAD_DIM, length > 0, HEAD_DIM, DEPTH)


@triton.jit(do_not_specialize=["rows", "keys", "segments"])
def _sum_picked(
    attains, picked, cu_seqlens_q, cu_seqlens_k, partial, rows, keys, segments, chunk, packed_rows,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PACKED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Max mode: partial c [split, KV, packed rows] of the keys of one chunk."""
    block = tl.program_id(0)
    segment = segment_of_block(cu_seqlens_k, segments, block, chunk)
    first_row, length = segment_bounds(cu_seqlens_q, segment, rows)
    first_key, available = segment_bounds(cu_seqlens_k, segment, keys)
    split = block - first_key // chunk - segment
    begin = split * chunk
    if (begin >= 0) & (begin < available):
        end = tl.minimum(begin + chunk, available)
        target = split.to(tl.int64) * KV_HEADS * packed_rows + packed_start(first_row, segment, GROUP, PACKED)
        for tile in range(0, tl.cdiv(length * GROUP * KV_HEADS, BLOCK_ROWS)):
            number = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # head * length + token
            # Added up across the tile's keys at the end alone: a sum over lanes takes more than the tile itself.
            total = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
            for start in range(begin, end, BLOCK_KEYS):
                position = start + tl.arange(0, BLOCK_KEYS)
                row = tl.load(attains + first_key + position, mask=position < end, other=-1)
                value = tl.load(picked + first_key + position, mask=position < end, other=0)
                total += tl.where(row[None, :] == number[:, None], value[None, :], 0.0)
            kv_head, row = number // (length * GROUP), number % (length * GROUP)
            inside = number < length * GROUP * KV_HEADS
            tl.store(partial + target + kv_head.to(tl.int64) * packed_rows + row, tl.sum(total, 1), mask=inside)


@triton.jit
def _row_step(
    sums, total, query_tile, query, offsets, token, number, norm, row_c, key, key_scale, g, attains, start, end, last,
    part, shift, scale, share, key_stride,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_SCALE: tl.constexpr, MEAN: tl.constexpr,
    SUM_ONLY: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradients of a tile of rows; with SUM_ONLY to c."""
    key, position, offset = key_block(key, start, last, key_stride, MASKED, BLOCK_KEYS)
    key_tile = load_tile(key, offset * key_stride, part, HEAD_DIM, DEPTH)
    if HEAD_DIM <= DEPTH:
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
    else:
        logits = product(query_tile, query, offsets, key, offset * key_stride, HEAD_DIM, DEPTH, PRECISION)
    factor = tl.full([BLOCK_KEYS], scale, tl.float32)
    if HAS_SCALE:
        factor *= tl.load(key_scale + start + offset)
    p = tl.exp2(logits * (factor * _LOG2_E)[None, :] - norm[:, None])
    if MASKED:
        visible = (position < end)[None, :]
        if CAUSAL:
            visible = visible & (position[None, :] <= token[:, None] + shift)
        p = tl.where(visible, p, 0.0)
    wg = tl.load(g + start + offset)[None, :]
    if MEAN:
        wg *= share
    else:
        wg = tl.where(tl.load(attains + start + offset)[None, :] == number[:, None], wg, 0.0)
    if SUM_ONLY:
        total += tl.sum(p * wg, 1)
    else:
        d = p * (wg - row_c[:, None]) * factor[None, :]
        sums = _add_product(d, key_tile, sums, WIDE, WIDE_PRECISION)
    return sums, total


@triton.jit(do_not_specialize=["rows", "keys", "segments", "slots"])
def _row_gradients(
    query, key, key_scale, cu_seqlens_q, cu_seqlens_k, norms, c, g, attains, partial,
    rows, keys, segments, chunk, slots, packed_rows, scale, key_stride, key_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_SCALE: tl.constexpr, MEAN: tl.constexpr, SUM_ONLY: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partial d query [split, KV, packed rows, Dh] of the keys of one chunk; with SUM_ONLY partial c [split, KV, packed
    rows] instead."""
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
        last = available - 1
        shift = available - length
        everyone = end
        if CAUSAL:
            everyone = tl.minimum(end, shift + 1)  # the keys that every row sees
        unmasked = begin + tl.maximum(everyone - begin, 0) // BLOCK_KEYS * BLOCK_KEYS
        key += first_key.to(tl.int64) * key_stride + kv_head.to(tl.int64) * key_head_stride
        g += first_key
        attains += first_key
        if HAS_SCALE:
            key_scale += first_key
        share = 1.0 / (length * GROUP * KV_HEADS).to(tl.float32)
        lane = tl.arange(0, BLOCK_ROWS)
        lanes = lane * HEAD_DIM
        head_start = kv_head.to(tl.int64) * packed_rows + packed_start(first_row, segment, GROUP, PACKED)
        for tile in range(slot, tl.cdiv(length * GROUP, BLOCK_ROWS), slots):
            row = tile * BLOCK_ROWS + lane
            token = row % length
            number = kv_head * GROUP * length + row  # head * length + token
            at = head_start + tile * BLOCK_ROWS
            norm = tl.load(norms + at + lane)
            base = query + at * HEAD_DIM
            query_tile = stationary_tile(base, lanes, HEAD_DIM, DEPTH)
            target = partial + (split.to(tl.int64) * KV_HEADS * packed_rows + at) * (1 if SUM_ONLY else HEAD_DIM)
            if SUM_ONLY:
                row_c = tl.zeros([BLOCK_ROWS], tl.float32)
            else:
                row_c = tl.load(c + at + lane)
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            for part in range(0, 1 if SUM_ONLY else (HEAD_DIM + DEPTH - 1) // DEPTH):
                sums = tl.zeros([BLOCK_ROWS, DEPTH], tl.float32)
                for start in range(begin, unmasked, BLOCK_KEYS):
                    sums, total = _row_step(
                        sums, total, query_tile, base, lanes, token, number, norm, row_c, key, key_scale, g, attains,
                        start, end, last, part, shift, scale, share, key_stride, HEAD_DIM, CAUSAL, False, HAS_SCALE,
                        MEAN, SUM_ONLY, PRECISION, WIDE, WIDE_PRECISION, BLOCK_KEYS, DEPTH,
                    )  # fmt: skip
                for start in range(unmasked, end, BLOCK_KEYS):
                    sums, total = _row_step(
                        sums, total, query_tile, base, lanes, token, number, norm, row_c, key, key_scale, g, attains,
                        start, end, last, part, shift, scale, share, key_stride, HEAD_DIM, CAUSAL, True, HAS_SCALE,
                        MEAN, SUM_ONLY, PRECISION, WIDE, WIDE_PRECISION, BLOCK_KEYS, DEPTH,
                    )  # fmt: skip
                if not SUM_ONLY:
                    depth = part * DEPTH + tl.arange(0, DEPTH)
                    inside = (row < length * GROUP)[:, None] & (depth < HEAD_DIM)[None, :]
                    tl.store(target + lanes[:, None] + depth[None, :], sums, mask=inside)
            if SUM_ONLY:
                tl.store(target + lane, total, mask=row < length * GROUP)


@triton.jit(do_not_specialize=["rows", "keys", "segments", "chunk"])
def _sum_splits(
    partial, cu_seqlens_q, cu_seqlens_k, out, rows, keys, segments, chunk, packed_rows, head_stride, row_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PACKED: tl.constexpr, TO_PACKED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """out [Tq, H, WIDTH] from partial [split, KV, packed rows, WIDTH] in ascending order of splits; or packed as well,
    then with zeros where there is no row."""
    segment, first_row, length, kv_head, row, packed = packed_block(
        cu_seqlens_q, rows, segments, packed_rows, GROUP, KV_HEADS, PACKED, BLOCK_ROWS
    )
    _, available = segment_bounds(cu_seqlens_k, segment, keys)
    column = tl.arange(0, BLOCK_WIDTH)
    known = (column < WIDTH)[None, :] & (row < length * GROUP)[:, None]
    result = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for split in range(0, tl.cdiv(available, chunk)):
        source = packed + split * packed_rows.to(tl.int64) * KV_HEADS
        result += tl.load(partial + source[:, None] * WIDTH + column[None, :], mask=known, other=0)
    if TO_PACKED:
        tl.store(out + packed[:, None] * WIDTH + column[None, :], result, mask=(column < WIDTH)[None, :])
    else:
        token, head = row_heads(row, tl.maximum(length, 1), GROUP)
        target = (first_row + token).to(tl.int64) * row_stride + (kv_head * GROUP + head).to(tl.int64) * head_stride
        tl.store(out + target[:, None] + column[None, :], result, mask=known)


@triton.jit
def _key_sums(
    query, key_tile, key_head, key_offsets, norms, c, position, own_g, attained, factor, scale_sum, length, start,
    kv_head, part, shift,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, HAS_SCALE: tl.constexpr, MEAN: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of a tile of keys, over the rows of one key head: d key before its factor, and d key_scale's sum."""
    lane = tl.arange(0, BLOCK_ROWS)
    sums = tl.zeros([BLOCK_KEYS, DEPTH], tl.float32)
    for first in range(0, length * GROUP, BLOCK_ROWS):
        at = start + first
        tile = query + at * HEAD_DIM
        query_tile = load_tile(tile, lane * HEAD_DIM, part, HEAD_DIM, DEPTH)
        if HEAD_DIM <= DEPTH:
            logits = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)
        else:
            logits = product(key_tile, key_head, key_offsets, tile, lane * HEAD_DIM, HEAD_DIM, DEPTH, PRECISION)
        p = tl.exp2(logits * (factor * _LOG2_E)[:, None] - tl.load(norms + at + lane)[None, :])
        if MASKED:
            p = tl.where(position[:, None] <= ((first + lane) % length)[None, :] + shift, p, 0.0)
        wg = own_g[:, None]
        if not MEAN:
            wg = tl.where(attained[:, None] == (kv_head * GROUP * length + first + lane)[None, :], wg, 0.0)
        d = p * (wg - tl.load(c + at + lane)[None, :])
        if HAS_SCALE:
            scale_sum += tl.sum(tl.where((d == 0) | (part > 0), 0.0, d * logits), 1)
        sums = _add_product(d, query_tile, sums, WIDE, WIDE_PRECISION)
    return sums, scale_sum


@triton.jit(do_not_specialize=["rows", "keys", "segments"])
def _key_gradients(
    query, key, key_scale, cu_seqlens_q, cu_seqlens_k, norms, c, g, attains,
    grad_key, grad_key_scale, rows, keys, segments, packed_rows, scale, key_stride, key_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PACKED: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_SCALE: tl.constexpr, MEAN: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """d key and d key_scale of a block of keys, logits as [keys, rows]."""
    block = tl.program_id(0)
    segment = segment_of_block(cu_seqlens_k, segments, block, BLOCK_KEYS)
    first_row, length = segment_bounds(cu_seqlens_q, segment, rows)
    first_key, available = segment_bounds(cu_seqlens_k, segment, keys)
    first = (block - first_key // BLOCK_KEYS - segment) * BLOCK_KEYS
    if (first >= 0) & (first < available):
        position = first + tl.arange(0, BLOCK_KEYS)
        index = first_key.to(tl.int64) + tl.minimum(position, available - 1)
        own_g = tl.load(g + index)
        attained = tl.zeros([BLOCK_KEYS], tl.int32)
        if MEAN:
            own_g /= tl.maximum(length * GROUP * KV_HEADS, 1).to(tl.float32)
        else:
            attained = tl.load(attains + index)
        own_scale = tl.full([BLOCK_KEYS], 1.0, tl.float32)
        if HAS_SCALE:
            own_scale = tl.load(key_scale + index)
        factor = own_scale * scale
        shift = available - length
        scale_sum = tl.zeros([BLOCK_KEYS], tl.float32)
        start = packed_start(first_row, segment, GROUP, PACKED).to(tl.int64)
        for kv_head in range(0, KV_HEADS):
            key_head = key + tl.cast(kv_head, tl.int64) * key_head_stride
            key_offsets = index * key_stride
            key_tile = stationary_tile(key_head, key_offsets, HEAD_DIM, DEPTH)
            for part in range(0, (HEAD_DIM + DEPTH - 1) // DEPTH):
                if CAUSAL and first + BLOCK_KEYS - 1 > shift:  # some row does not see the last key
                    sums, scale_sum = _key_sums(
                        query, key_tile, key_head, key_offsets, norms, c, position, own_g, attained, factor, scale_sum,
                        length, start, kv_head, part, shift, GROUP, HEAD_DIM, True, HAS_SCALE, MEAN, PRECISION, WIDE,
                        WIDE_PRECISION, BLOCK_ROWS, BLOCK_KEYS, DEPTH,
                    )  # fmt: skip
                else:
                    sums, scale_sum = _key_sums(
                        query, key_tile, key_head, key_offsets, norms, c, position, own_g, attained, factor, scale_sum,
                        length, start, kv_head, part, shift, GROUP, HEAD_DIM, False, HAS_SCALE, MEAN, PRECISION, WIDE,
                        WIDE_PRECISION, BLOCK_ROWS, BLOCK_KEYS, DEPTH,
                    )  # fmt: skip
                depth = part * DEPTH + tl.arange(0, DEPTH)
                target = (index * KV_HEADS + kv_head)[:, None] * HEAD_DIM + depth[None, :]
                tl.store(
                    grad_key + target,
                    sums * factor[:, None],
                    mask=(position < available)[:, None] & (depth < HEAD_DIM)[None, :],
                )
            start += packed_rows
        if HAS_SCALE:
            tl.store(grad_key_scale + index, scale_sum * scale, mask=position < available)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See the reference for the formulas and ``_schemas`` for the shapes."""
    check_dtype("query", query)
    (rows, heads, head_dim), (keys, kv_heads, _) = query.shape, key.shape
    segments, columns = cu_seqlens_k.shape[0] - 1, grad.shape[0]
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    grad_scale = query.new_empty(keys if key_scale is not None else 0, dtype=torch.float32)
    if rows == 0 or keys == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_scale.zero_()
    query, key = unit_stride(query), unit_stride(key)
    grad, key_scale = grad.contiguous(), None if key_scale is None else key_scale.contiguous()
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    cu_columns = cu_seqlens_k if cu_columns is None else cu_columns
    rows_a_segment = triton.cdiv(rows, segments) * (heads // kv_heads)
    tile = gradient_tiles(query, rows_a_segment)
    splits = split_keys(query, key, segments, tile, bytes_a_row=4 * head_dim)
    wide, wide_precision = _wide(query)
    heads_of = {"GROUP": heads // kv_heads, "KV_HEADS": kv_heads, "PACKED": PACKED}
    shared = {
        **heads_of,
        "HEAD_DIM": head_dim,
        "CAUSAL": causal,
        "HAS_SCALE": key_scale is not None,
        "MEAN": reduce == "mean",
        "PRECISION": precision(query),
        "WIDE": wide,
        "WIDE_PRECISION": wide_precision,
    }
    packed = packed_rows(query, kv_heads, segments)
    packed_query = query.new_empty(kv_heads, packed, head_dim)
    norms = query.new_empty(kv_heads, packed, dtype=torch.float32)
    c = torch.empty_like(norms)
    g, picked = query.new_empty(2, keys, dtype=torch.float32)
    attains = query.new_empty(keys, dtype=torch.int32)
    given = (packed_query, key, key_scale, cu_seqlens_q, cu_seqlens_k, norms, c, g, attains)
    sizes, key_strides = (rows, keys, segments), (key.stride(0), key.stride(1))

    def row_gradients(partial: Tensor, sum_only: bool) -> None:
        _row_gradients[(splits.blocks * kv_heads * splits.slots,)](
            *given, partial, *sizes, splits.chunk, splits.slots, packed, scale, *key_strides,
            SUM_ONLY=sum_only, **shared, **tile.constants(),
        )  # fmt: skip

    def add_up(partial: Tensor, chunk: int, out: Tensor, width: int) -> None:
        block_width = triton.next_power_of_2(width)
        block_rows = min(PACKED, max(1, 1024 // block_width))
        _sum_splits[(packed // block_rows * kv_heads,)](
            partial, cu_seqlens_q, cu_seqlens_k, out, *sizes, chunk, packed, out.stride(1), out.stride(0),
            **heads_of, TO_PACKED=out is c, WIDTH=width, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=4,
        )  # fmt: skip

    with on_device_of(query):
        _pack[(packed // 32 * kv_heads,)](
            query, lse, cu_seqlens_q, packed_query, norms, rows, segments, packed, query.stride(0), query.stride(1),
            **heads_of, HEAD_DIM=head_dim, BLOCK_ROWS=32, DEPTH=tile.depth, num_warps=4,
        )  # fmt: skip
        _spread[(blocks_of(keys, segments, 512),)](
            grad, scores, argrow, cu_seqlens_q, cu_seqlens_k, column_start, cu_columns, g, attains, picked,
            rows, keys, columns, segments, HAS_START=column_start is not None, MEAN=reduce == "mean", BLOCK=512,
            num_warps=4,
        )  # fmt: skip
        chunk = splits.chunk
        if reduce == "max":
            chunk = max(1024, triton.next_power_of_2(triton.cdiv(keys, multiprocessors(query))))
            partial = query.new_empty(keys // chunk + 1, kv_heads, packed, dtype=torch.float32)
            _sum_picked[(blocks_of(keys, segments, chunk),)](
                attains, picked, cu_seqlens_q, cu_seqlens_k, partial, *sizes, chunk, packed,
                **heads_of, BLOCK_ROWS=128, BLOCK_KEYS=32, num_warps=4,
            )  # fmt: skip
        else:
            partial = query.new_empty(splits.most, kv_heads, packed, dtype=torch.float32)
            row_gradients(partial, True)
        add_up(partial, chunk, c, 1)
        _key_gradients[(blocks_of(keys, segments, tile.keys),)](
            *given, grad_key, grad_scale, *sizes, packed, scale, *key_strides, **shared, **tile.constants()
        )
        partial = query.new_empty(splits.most, kv_heads, packed, head_dim, dtype=torch.float32)
        row_gradients(partial, False)
        add_up(partial, splits.chunk, grad_query, head_dim)
    return grad_query, grad_key, grad_scale


def _wide(query: Tensor) -> tuple[tl.dtype, str]:
    """The dtype and precision of the products with d logit. fp16 has too small a range for it: those are tf32."""
    if query.dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return tl.float32, "ieee" if query.dtype == torch.float32 or is_amd() else "tf32x3"
