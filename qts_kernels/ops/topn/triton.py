"""Exact segmented Top-n: a radix select over many blocks in six launches, none of which waits for another block.

1. zero the histograms; 2.-4. histogram of the next 11 (then 10) bits of the keys that share the prefix found so far;
5. with the exact n-th key known, count in each block what lies above it and what equals it; 6. compact in index order.
Each launch works out the digit that the one before it counted, in every program: cheaper than a launch of its own.
Histograms are sums of integers, so atomics do not touch the result: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops._triton_common import blocks_of, check_dtype, on_device_of, segment_bounds, segment_of_block

BITS = (11, 11, 10)  # of the 32-bit key, from the top
SHIFTS = (21, 10, 0)
BINS = tuple(1 << bits for bits in BITS)


@triton.jit
def _ordered_key(scores, position, inside):
    """uint32 keys in the order of the fp32 scores: NaN is 0, below -inf, and -0 equals +0."""
    score = tl.load(scores + position, mask=inside, other=0.0)
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    key = tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(score == score, key, 0)


@triton.jit
def _kept(n, cu_seqlens, segment, total, max_n):
    """How many rows of a segment are kept."""
    _, length = segment_bounds(cu_seqlens, segment, total)
    wanted = tl.maximum(tl.load(n + segment), 0)
    return tl.minimum(wanted, tl.minimum(length, max_n).to(tl.int64)).to(tl.int32)


@triton.jit
def _next_digit(histogram, segment, prefix, rank, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """Extend the prefix by the digit that holds the rank-th largest key, and make rank relative to that digit."""
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + segment.to(tl.int64) * BINS + bins)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # keys in this bin or above it; falls with the bin
    digit = tl.sum((at_least >= rank).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(bins > digit, counts, 0), 0)
    return prefix | (digit.to(tl.uint32) << SHIFT), rank - above


@triton.jit(do_not_specialize=["segments", "total", "max_n"])
def _histogram(
    scores, cu_seqlens, n, segments, total, max_n, before, state, histogram,
    LEVEL: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr,
    SHIFT_BEFORE: tl.constexpr, BINS_BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the digit at SHIFT among the keys that share the prefix; LEVEL 0 has no prefix yet."""
    block = tl.program_id(0)
    segment = segment_of_block(cu_seqlens, segments, block, BLOCK)
    start, length = segment_bounds(cu_seqlens, segment, total)
    first = (block - start // BLOCK - segment) * BLOCK
    if (first >= 0) & (first < length):
        position = first + tl.arange(0, BLOCK)
        inside = position < length
        key = _ordered_key(scores, start + position, inside)
        if LEVEL > 0:
            # state [level, S, 2]: prefix and rank. The first block of a segment leaves them for the next launch.
            if LEVEL == 1:
                prefix = tl.zeros((), tl.uint32)
                rank = _kept(n, cu_seqlens, segment, total, max_n)
            else:
                previous = state + ((LEVEL - 2) * segments + segment) * 2
                prefix = tl.load(previous).to(tl.uint32, bitcast=True)
                rank = tl.load(previous + 1)
            prefix, rank = _next_digit(before, segment, prefix, rank, SHIFT_BEFORE, BINS_BEFORE)
            if first == 0:
                following = state + ((LEVEL - 1) * segments + segment) * 2
                tl.store(following, prefix.to(tl.int32, bitcast=True))
                tl.store(following + 1, rank)
            inside = inside & (key >> SHIFT_BEFORE == prefix >> SHIFT_BEFORE)
        digit = ((key >> SHIFT) & (BINS - 1)).to(tl.int32)
        counts = tl.histogram(digit, BINS, mask=inside)
        target = histogram + segment.to(tl.int64) * BINS + tl.arange(0, BINS)
        tl.atomic_add(target, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["segments", "total"])
def _count(
    scores, cu_seqlens, segments, total, before, state, counts,
    BINS_BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For each block: how many keys lie above the n-th largest, and how many equal it."""
    block = tl.program_id(0)
    segment = segment_of_block(cu_seqlens, segments, block, BLOCK)
    start, length = segment_bounds(cu_seqlens, segment, total)
    first = (block - start // BLOCK - segment) * BLOCK
    if (first >= 0) & (first < length):
        position = first + tl.arange(0, BLOCK)
        inside = position < length
        key = _ordered_key(scores, start + position, inside)
        previous = state + (segments + segment) * 2
        prefix = tl.load(previous).to(tl.uint32, bitcast=True)
        threshold, ties = _next_digit(before, segment, prefix, tl.load(previous + 1), 0, BINS_BEFORE)
        if first == 0:
            following = state + (2 * segments + segment) * 2
            tl.store(following, threshold.to(tl.int32, bitcast=True))
            tl.store(following + 1, ties)
        tl.store(counts + block * 2, tl.sum((inside & (key > threshold)).to(tl.int32), 0))
        tl.store(counts + block * 2 + 1, tl.sum((inside & (key == threshold)).to(tl.int32), 0))


@triton.jit(do_not_specialize=["segments", "total", "max_n", "rows"])
def _compact(
    scores, cu_seqlens, n, segments, total, max_n, state, counts, indices, cu_seqlens_out, rows,
    BLOCK: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Write the kept rows of each block behind those of the blocks before it; then the offsets and the tail of -1."""
    block = tl.program_id(0)
    segment = segment_of_block(cu_seqlens, segments, block, BLOCK)
    start, length = segment_bounds(cu_seqlens, segment, total)
    scan = tl.arange(0, SCAN)
    before = tl.zeros((), tl.int32)  # rows that earlier segments keep
    everything = tl.zeros((), tl.int32)
    for s in range(0, segments, SCAN):
        other = s + scan
        known = other < segments
        kept = tl.where(known, _kept(n, cu_seqlens, tl.minimum(other, segments - 1), total, max_n), 0)
        before += tl.sum(tl.where(other < segment, kept, 0), 0)
        everything += tl.sum(kept, 0)
    first_block = start // BLOCK + segment
    first = (block - first_block) * BLOCK
    if first == 0:
        if segment == 0:
            tl.store(cu_seqlens_out, 0)
        tl.store(cu_seqlens_out + segment + 1, before + _kept(n, cu_seqlens, segment, total, max_n))
    if (first >= 0) & (first < length):
        position = first + tl.arange(0, BLOCK)
        inside = position < length
        key = _ordered_key(scores, start + position, inside)
        following = state + (2 * segments + segment) * 2
        threshold = tl.load(following).to(tl.uint32, bitcast=True)
        ties = tl.load(following + 1)
        above_before = tl.zeros((), tl.int32)
        equal_before = tl.zeros((), tl.int32)
        for b in range(first_block, block, SCAN):
            other = b + scan
            above_before += tl.sum(tl.load(counts + other * 2, mask=other < block, other=0), 0)
            equal_before += tl.sum(tl.load(counts + other * 2 + 1, mask=other < block, other=0), 0)
        above = (inside & (key > threshold)).to(tl.int32)
        equal = (inside & (key == threshold)).to(tl.int32)
        # One scan for both: a block holds fewer than 2^16 keys.
        packed = above | (equal << 16)
        earlier = tl.cumsum(packed, 0) - packed
        rank = equal_before + (earlier >> 16)
        keep = (above != 0) | ((equal != 0) & (rank < ties))
        slot = before + above_before + (earlier & 0xFFFF) + tl.minimum(rank, ties)
        tl.store(indices + slot, (start + position).to(tl.int64), mask=keep & (slot < rows))
    # Every program fills its share of the tail.
    share = tl.cdiv(rows, tl.num_programs(0))
    stop = tl.minimum((block + 1) * share, rows)
    for r in range(tl.maximum(block * share, everything), stop, SCAN):
        tl.store(indices + r + scan, tl.full([SCAN], -1, tl.int64), mask=r + scan < stop)


def block_size(total: int) -> int:
    """Scores a program: enough programs for every multiprocessor, few enough that atomics do not queue."""
    return 1024 if total <= 1 << 18 else 4096


def topn(scores: Tensor, cu_seqlens: Tensor, n: Tensor, max_n: int) -> tuple[Tensor, Tensor]:
    """See ``qts_kernels.topn``."""
    check_dtype("scores", scores)
    segments, total = cu_seqlens.shape[0] - 1, scores.shape[0]
    rows = min(segments * max_n, total)
    indices = torch.empty(rows, dtype=torch.int64, device=scores.device)
    cu_seqlens_out = torch.empty_like(cu_seqlens)
    scores, cu_seqlens, n = scores.float().contiguous(), cu_seqlens.contiguous(), n.contiguous()
    size = block_size(total)
    blocks = blocks_of(total, segments, size)
    grid = (blocks,)
    histograms = torch.zeros(segments * sum(BINS), dtype=torch.int32, device=scores.device)
    histograms = histograms.split([segments * bins for bins in BINS])
    workspace = torch.empty(segments * 2 * len(BINS) + blocks * 2, dtype=torch.int32, device=scores.device)
    state, counts = workspace.split([segments * 2 * len(BINS), blocks * 2])
    scan = min(1024, triton.next_power_of_2(max(blocks, segments)))
    with on_device_of(scores):
        for level, (bins, shift) in enumerate(zip(BINS, SHIFTS, strict=True)):
            before = max(level - 1, 0)
            _histogram[grid](
                scores, cu_seqlens, n, segments, total, max_n, histograms[before], state, histograms[level],
                LEVEL=level, SHIFT=shift, BINS=bins, SHIFT_BEFORE=SHIFTS[before], BINS_BEFORE=BINS[before],
                BLOCK=size, num_warps=4,
            )  # fmt: skip
        _count[grid](
            scores, cu_seqlens, segments, total, histograms[-1], state, counts,
            BINS_BEFORE=BINS[-1], BLOCK=size, num_warps=4,
        )  # fmt: skip
        _compact[grid](
            scores, cu_seqlens, n, segments, total, max_n, state, counts, indices, cu_seqlens_out, rows,
            BLOCK=size, SCAN=scan, num_warps=4,
        )  # fmt: skip
    return indices, cu_seqlens_out
