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
    segment_of_rows,
)
from qts_kernels.ops.relevance.triton_tiles import (
    LOG2_E,
    gradient_tiles,
    load_tile,
    precision,
    product,
    row_heads,
    split_keys,
    stationary_tile,
    unit_stride,
)

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _norm(lse, index):
    """What the logits of each row are taken less; +inf, a weight of 0, where the row sees no key."""
    value = tl.load(lse + index)
    return tl.where(value == -float("inf"), float("inf"), value)


@triton.jit
def _add_product(d, tile, sums, WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr):
    """sums + d @ tile. d keeps 16 bits of its mantissa where the tile is bf16: rounded to 8, it alone would spend the
    error budget."""
    if WIDE.is_bf16():
        high = d.to(tl.bfloat16)
        sums = tl.dot(high, tile, sums)
        return tl.dot((d - high.to(tl.float32)).to(tl.bfloat16), tile, sums)
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


@triton.jit(do_not_specialize=["rows", "keys", "segments"])
def _sum_picked(
    attains, picked, cu_seqlens_q, cu_seqlens_k, partial, rows, keys, segments, chunk,
    HEADS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Max mode: partial c [split, H, Tq] of the keys of one chunk."""
    block = tl.program_id(0)
    segment = segment_of_block(cu_seqlens_k, segments, block, chunk)
    first_row, length = segment_bounds(cu_seqlens_q, segment, rows)
    first_key, available = segment_bounds(cu_seqlens_k, segment, keys)
    split = block - first_key // chunk - segment
    begin = split * chunk
    if (begin >= 0) & (begin < available):
        end = tl.minimum(begin + chunk, available)
        for tile in range(0, tl.cdiv(length * HEADS, BLOCK_ROWS)):
            number = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)  # head * length + token
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            for start in range(begin, end, BLOCK_KEYS):
                position = start + tl.arange(0, BLOCK_KEYS)
                row = tl.load(attains + first_key + position, mask=position < end, other=-1)
                value = tl.load(picked + first_key + position, mask=position < end, other=0)
                total += tl.sum(tl.where(row[None, :] == number[:, None], value[None, :], 0.0), 1)
            target = (split * HEADS + number // length).to(tl.int64) * rows + first_row + number % length
            tl.store(partial + target, total, mask=number < length * HEADS)


@triton.jit(do_not_specialize=["rows", "keys", "segments", "slots"])
def _row_gradients(
    query, key, key_scale, cu_seqlens_q, cu_seqlens_k, lse, c, g, attains, partial,
    rows, keys, segments, chunk, slots, scale,
    query_stride, query_head_stride, key_stride, key_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, HAS_SCALE: tl.constexpr,
    MEAN: tl.constexpr, SUM_ONLY: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, WIDE_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """partial d query [split, H, Tq, Dh] of the keys of one chunk; with SUM_ONLY partial c [split, H, Tq] instead."""
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
        query += kv_head.to(tl.int64) * GROUP * query_head_stride
        key += first_key.to(tl.int64) * key_stride + kv_head.to(tl.int64) * key_head_stride
        share = 1.0 / (length * GROUP * KV_HEADS).to(tl.float32)
        for tile in range(slot, tl.cdiv(length * GROUP, BLOCK_ROWS), slots):
            token, head = row_heads(tile, length * GROUP, GROUP, BLOCK_ROWS)
            inside = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < length * GROUP
            offsets = (first_row + token).to(tl.int64) * query_stride + head.to(tl.int64) * query_head_stride
            full_head = kv_head * GROUP + head
            number = full_head * length + token
            statistic = full_head.to(tl.int64) * rows + first_row + token
            norm = _norm(lse, statistic)
            query_tile = stationary_tile(query, offsets, HEAD_DIM, DEPTH)
            target = (split * GROUP * KV_HEADS + full_head).to(tl.int64) * rows + first_row + token
            if SUM_ONLY:
                row_c = tl.zeros([BLOCK_ROWS], tl.float32)
            else:
                row_c = tl.load(c + statistic)
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            for part in range(0, 1 if SUM_ONLY else (HEAD_DIM + DEPTH - 1) // DEPTH):
                sums = tl.zeros([BLOCK_ROWS, DEPTH], tl.float32)
                for start in range(begin, end, BLOCK_KEYS):
                    position = start + tl.arange(0, BLOCK_KEYS)
                    index = tl.minimum(position, available - 1).to(tl.int64)
                    key_tile = load_tile(key, index * key_stride, part, HEAD_DIM, DEPTH)
                    if HEAD_DIM <= DEPTH:
                        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)
                    else:
                        logits = product(
                            query_tile, query, offsets, key, index * key_stride, HEAD_DIM, DEPTH, PRECISION
                        )
                    factor = tl.full([BLOCK_KEYS], scale, tl.float32)
                    if HAS_SCALE:
                        factor *= tl.load(key_scale + first_key + index)
                    p = tl.exp2((logits * factor[None, :] - norm[:, None]) * _LOG2_E)
                    visible = (position < end)[None, :]
                    if CAUSAL:
                        visible = visible & (position[None, :] <= token[:, None] + shift)
                    p = tl.where(visible, p, 0.0)
                    wg = tl.load(g + first_key + index)[None, :]
                    if MEAN:
                        wg *= share
                    else:
                        wg = tl.where(tl.load(attains + first_key + index)[None, :] == number[:, None], wg, 0.0)
                    if SUM_ONLY:
                        total += tl.sum(p * wg, 1)
                    else:
                        d = p * (wg - row_c[:, None]) * factor[None, :]
                        sums = _add_product(d, key_tile, sums, WIDE, WIDE_PRECISION)
                if not SUM_ONLY:
                    depth = part * DEPTH + tl.arange(0, DEPTH)
                    tl.store(
                        partial + target[:, None] * HEAD_DIM + depth[None, :],
                        sums,
                        mask=inside[:, None] & (depth < HEAD_DIM)[None, :],
                    )
            if SUM_ONLY:
                tl.store(partial + target, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "keys", "segments", "chunk"])
def _sum_splits(
    partial, cu_seqlens_q, cu_seqlens_k, out, rows, keys, segments, chunk, head_stride, row_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """out [H, Tq, WIDTH], in any order of its axes, from partial [split, H, Tq, WIDTH] in ascending order of splits."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < tl.cast(rows, tl.int64) * HEADS
    segment = segment_of_rows(cu_seqlens_q, segments, (row % rows).to(tl.int32))
    _, available = segment_bounds(cu_seqlens_k, segment, keys)
    splits = tl.where(inside, tl.cdiv(available, chunk), 0)
    column = tl.arange(0, BLOCK_WIDTH)
    result = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for split in range(0, tl.max(splits, 0)):
        source = (row + split * tl.cast(rows, tl.int64) * HEADS)[:, None] * WIDTH + column[None, :]
        result += tl.load(partial + source, mask=(split < splits)[:, None] & (column < WIDTH)[None, :], other=0)
    target = (row // rows)[:, None] * head_stride + (row % rows)[:, None] * row_stride + column[None, :]
    tl.store(out + target, result, mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit(do_not_specialize=["rows", "keys", "segments"])
def _key_gradients(
    query, key, key_scale, cu_seqlens_q, cu_seqlens_k, lse, c, g, attains,
    grad_key, grad_key_scale, rows, keys, segments, scale,
    query_stride, query_head_stride, key_stride, key_head_stride,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, HAS_SCALE: tl.constexpr,
    MEAN: tl.constexpr, PRECISION: tl.constexpr,
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
        for kv_head in range(0, KV_HEADS):
            group = query + tl.cast(kv_head * GROUP, tl.int64) * query_head_stride
            key_head = key + tl.cast(kv_head, tl.int64) * key_head_stride
            key_offsets = index * key_stride
            key_tile = stationary_tile(key_head, key_offsets, HEAD_DIM, DEPTH)
            for part in range(0, (HEAD_DIM + DEPTH - 1) // DEPTH):
                sums = tl.zeros([BLOCK_KEYS, DEPTH], tl.float32)
                for tile in range(0, tl.cdiv(length * GROUP, BLOCK_ROWS)):
                    token, head = row_heads(tile, length * GROUP, GROUP, BLOCK_ROWS)
                    inside = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS) < length * GROUP
                    offsets = (first_row + token).to(tl.int64) * query_stride + head.to(tl.int64) * query_head_stride
                    full_head = kv_head * GROUP + head
                    statistic = full_head.to(tl.int64) * rows + first_row + token
                    query_tile = load_tile(group, offsets, part, HEAD_DIM, DEPTH)
                    if HEAD_DIM <= DEPTH:
                        logits = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)
                    else:
                        logits = product(key_tile, key_head, key_offsets, group, offsets, HEAD_DIM, DEPTH, PRECISION)
                    p = tl.exp2((logits * factor[:, None] - _norm(lse, statistic)[None, :]) * _LOG2_E)
                    visible = inside[None, :]
                    if CAUSAL:
                        visible = visible & (position[:, None] <= token[None, :] + shift)
                    p = tl.where(visible, p, 0.0)
                    wg = own_g[:, None]
                    if not MEAN:
                        wg = tl.where(attained[:, None] == (full_head * length + token)[None, :], wg, 0.0)
                    d = p * (wg - tl.load(c + statistic)[None, :])
                    if HAS_SCALE:
                        scale_sum += tl.sum(tl.where((d == 0) | (part > 0), 0.0, d * logits), 1)
                    sums = _add_product(d, query_tile, sums, WIDE, WIDE_PRECISION)
                depth = part * DEPTH + tl.arange(0, DEPTH)
                target = (index * KV_HEADS + kv_head)[:, None] * HEAD_DIM + depth[None, :]
                tl.store(
                    grad_key + target,
                    sums * factor[:, None],
                    mask=(position < available)[:, None] & (depth < HEAD_DIM)[None, :],
                )
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
    packed_rows = triton.cdiv(rows, segments) * (heads // kv_heads)
    tile = gradient_tiles(query, packed_rows)
    # A quarter of the programs that the forward starts: each split costs a copy of d query.
    splits = split_keys(query, key, segments, tile, bytes_a_row=4 * head_dim, waves=1)
    wide, wide_precision = _wide(query)
    shared = {
        "GROUP": heads // kv_heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "CAUSAL": causal,
        "HAS_SCALE": key_scale is not None,
        "MEAN": reduce == "mean",
        "PRECISION": precision(query),
        "WIDE": wide,
        "WIDE_PRECISION": wide_precision,
    }
    strides = (query.stride(0), query.stride(1), key.stride(0), key.stride(1))
    c = torch.empty_like(lse)
    g, picked = query.new_empty(2, keys, dtype=torch.float32)
    attains = query.new_empty(keys, dtype=torch.int32)
    given = (query, key, key_scale, cu_seqlens_q, cu_seqlens_k, lse, c, g, attains)
    sizes = (rows, keys, segments)

    def row_gradients(partial: Tensor, sum_only: bool) -> None:
        _row_gradients[(splits.blocks * kv_heads * splits.slots,)](
            *given, partial, *sizes, splits.chunk, splits.slots, scale, *strides,
            SUM_ONLY=sum_only, **shared, **tile.constants(),
        )  # fmt: skip

    with on_device_of(query):
        _spread[(blocks_of(keys, segments, 512),)](
            grad, scores, argrow, cu_seqlens_q, cu_seqlens_k, column_start, cu_columns, g, attains, picked,
            rows, keys, columns, segments, HAS_START=column_start is not None, MEAN=reduce == "mean", BLOCK=512,
            num_warps=4,
        )  # fmt: skip
        chunk = splits.chunk
        if reduce == "max":
            chunk = max(1024, triton.next_power_of_2(triton.cdiv(keys, multiprocessors(query))))
            partial = query.new_empty(keys // chunk + 1, heads, rows, dtype=torch.float32)
            _sum_picked[(blocks_of(keys, segments, chunk),)](
                attains, picked, cu_seqlens_q, cu_seqlens_k, partial, rows, keys, segments, chunk,
                HEADS=heads, BLOCK_ROWS=128, BLOCK_KEYS=32, num_warps=4,
            )  # fmt: skip
        else:
            partial = query.new_empty(splits.most, heads, rows, dtype=torch.float32)
            row_gradients(partial, True)
        _add_up(partial, cu_seqlens_q, cu_seqlens_k, keys, chunk, c, c.stride(0), c.stride(1), 1)
        _key_gradients[(blocks_of(keys, segments, tile.keys),)](
            *given, grad_key, grad_scale, *sizes, scale, *strides, **shared, **tile.constants()
        )
        partial = query.new_empty(splits.most, heads, rows, head_dim, dtype=torch.float32)
        row_gradients(partial, False)
        _add_up(
            partial, cu_seqlens_q, cu_seqlens_k, keys, splits.chunk,
            grad_query, grad_query.stride(1), grad_query.stride(0), head_dim,
        )  # fmt: skip
    return grad_query, grad_key, grad_scale


def _wide(query: Tensor) -> tuple[tl.dtype, str]:
    """The dtype and precision of the products with d logit. fp16 has too small a range for it: those are tf32."""
    if query.dtype == torch.bfloat16:
        return tl.bfloat16, "tf32"
    return tl.float32, "ieee" if query.dtype == torch.float32 or is_amd() else "tf32x3"


def _add_up(
    partial: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, keys: int, chunk: int, out: Tensor, head_stride: int,
    row_stride: int, width: int,
) -> None:  # fmt: skip
    _, heads, rows = partial.shape[:3]
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, min(64, 1024 // block_width))
    _sum_splits[(triton.cdiv(heads * rows, block_rows),)](
        partial, cu_seqlens_q, cu_seqlens_k, out, rows, keys, cu_seqlens_q.shape[0] - 1, chunk, head_stride, row_stride,
        HEADS=heads, WIDTH=width, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, num_warps=4,
    )  # fmt: skip
