"""Largest remainder with caps: one program a segment, in integers, so that the order of sums does not matter.

``counts`` holds -1 for an entry that still shares, ``remainders`` its remainder. A program's threads read back what
others of it may have written, so a barrier stands between passes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops._triton_common import on_device_of, segment_bounds

MAX_BLOCK = 2048
_MAX_TOTAL = tl.constexpr(2**31 - 1)


@triton.jit
def _mantissa(weights, position, inside):
    """The weight as mantissa * 2^(exponent - 1075); 0 where it is not finite or negative."""
    weight = tl.load(weights + position, mask=inside, other=0.0)
    bits = weight.to(tl.int64, bitcast=True)
    exponent = bits >> 52  # negative where the sign is set, 2047 where not finite
    good = (exponent >= 0) & (exponent < 2047)
    mantissa = (bits & 0xFFFFFFFFFFFFF) | ((exponent > 0).to(tl.int64) << 52)
    return tl.where(good, mantissa, 0), tl.where(good, tl.maximum(exponent, 1), 1)


@triton.jit
def _integer(weights, position, inside, largest, spare):
    """The weight as an integer, in units of the largest one's last bit. See the reference."""
    mantissa, exponent = _mantissa(weights, position, inside)
    # Bounded below too: entries that share no more may be larger.
    return mantissa >> tl.minimum(tl.maximum(largest - exponent + spare, 0), 63)


@triton.jit
def _divide(left, integer, whole):
    """Quotient and remainder of left * integer by whole, exact: see the reference."""
    share = (left.to(tl.float64) * integer.to(tl.float64) / whole.to(tl.float64)).to(tl.int64)
    remainder = left * integer - share * whole
    correction = (remainder >= whole).to(tl.int64) - (remainder < 0).to(tl.int64)
    return share + correction, remainder - correction * whole


@triton.jit
def _cap(cap, position, inside, left, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        bound = tl.minimum(tl.maximum(tl.load(cap + position, mask=inside, other=0), 0), left)
    else:
        bound = tl.where(inside, left, 0)
    return bound


@triton.jit(do_not_specialize=["entries"])
def _allocate(weights, cu_seqlens, total, cap, counts, remainders, entries, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    start, length = segment_bounds(cu_seqlens, segment, entries)
    lane = tl.arange(0, BLOCK)
    wanted = tl.minimum(tl.maximum(tl.load(total + segment), 0), _MAX_TOTAL)
    left = tl.zeros((), tl.int64)
    for first in range(0, length, BLOCK):
        inside = first + lane < length
        left += tl.sum(_cap(cap, start + first + lane, inside, wanted, HAS_CAP), 0)
        tl.store(counts + start + first + lane, tl.full([BLOCK], -1, tl.int64), mask=inside)
    left = tl.minimum(left, wanted)
    tl.debug_barrier()

    whole = tl.zeros((), tl.int64)
    sharing = length
    bound = 1
    while (bound > 0) & (sharing > 0):
        sharing = 0
        largest = tl.full((), 1, tl.int64)
        for first in range(0, length, BLOCK):
            inside = first + lane < length
            inside = inside & (tl.load(counts + start + first + lane, mask=inside, other=0) < 0)
            _, exponent = _mantissa(weights, start + first + lane, inside)
            largest = tl.maximum(largest, tl.max(exponent, 0))
            sharing += tl.sum(inside.to(tl.int32), 0)
        spare = 0
        while (1 << (spare + 8)) < sharing:
            spare += 1
        whole = tl.zeros((), tl.int64)
        for first in range(0, length, BLOCK):
            inside = first + lane < length
            inside = inside & (tl.load(counts + start + first + lane, mask=inside, other=0) < 0)
            integer = _integer(weights, start + first + lane, inside, largest, spare)
            whole += tl.sum(tl.where(inside, integer, 0), 0)
        equal = whole == 0
        whole = tl.where(equal, tl.maximum(sharing, 1).to(tl.int64), whole)
        tl.debug_barrier()
        bound = 0
        taken = tl.zeros((), tl.int64)
        for first in range(0, length, BLOCK):
            position = start + first + lane
            inside = first + lane < length
            inside = inside & (tl.load(counts + position, mask=inside, other=0) < 0)
            integer = tl.where(equal, 1, _integer(weights, position, inside, largest, spare))
            share, remainder = _divide(left, tl.where(inside, integer, 0), whole)
            most = _cap(cap, position, inside, wanted, HAS_CAP)
            full = inside & (share >= most)
            tl.store(counts + position, most, mask=full)
            tl.store(remainders + position, remainder, mask=inside)
            bound += tl.sum(full.to(tl.int32), 0)
            taken += tl.sum(tl.where(full, most, 0), 0)
        left -= taken
        tl.debug_barrier()
        if bound == 0:
            given = tl.zeros((), tl.int64)
            for first in range(0, length, BLOCK):
                position = start + first + lane
                inside = first + lane < length
                inside = inside & (tl.load(counts + position, mask=inside, other=0) < 0)
                integer = tl.where(equal, 1, _integer(weights, position, inside, largest, spare))
                share, _ = _divide(left, tl.where(inside, integer, 0), whole)
                given += tl.sum(share, 0)
                # -1 - share: the entry still shares, and this is its count.
                tl.store(counts + position, -1 - share, mask=inside)
            left -= given
            tl.debug_barrier()

    # The left-th largest remainder: the largest threshold that as many reach.
    threshold = tl.zeros((), tl.int64)
    bit = tl.full((), 1, tl.int64) << 60
    while bit > 0:
        reach = tl.zeros((), tl.int64)
        for first in range(0, length, BLOCK):
            position = start + first + lane
            inside = first + lane < length
            inside = inside & (tl.load(counts + position, mask=inside, other=0) < 0)
            remainder = tl.load(remainders + position, mask=inside, other=-1)
            reach += tl.sum((remainder >= threshold + bit).to(tl.int64), 0)
        threshold = tl.where(reach >= left, threshold + bit, threshold)
        bit = bit >> 1
    above = tl.zeros((), tl.int64)
    for first in range(0, length, BLOCK):
        position = start + first + lane
        inside = first + lane < length
        inside = inside & (tl.load(counts + position, mask=inside, other=0) < 0)
        above += tl.sum((tl.load(remainders + position, mask=inside, other=-1) > threshold).to(tl.int64), 0)
    ties = left - above
    tl.debug_barrier()
    for first in range(0, length, BLOCK):
        position = start + first + lane
        inside = first + lane < length
        count = tl.load(counts + position, mask=inside, other=0)
        inside = inside & (count < 0)
        remainder = tl.load(remainders + position, mask=inside, other=-1)
        tie = (remainder == threshold).to(tl.int64)
        rank = tl.cumsum(tie, 0) - tie
        extra = (left > 0) & ((remainder > threshold) | ((tie != 0) & (rank < ties)))
        tl.store(counts + position, -1 - count + extra.to(tl.int64), mask=inside)
        ties -= tl.sum(tie, 0)


def allocate_tokens(weights: Tensor, cu_seqlens: Tensor, total: Tensor, cap: Tensor | None) -> Tensor:
    """See ``qts_kernels.allocate_tokens``."""
    entries, segments = weights.shape[0], total.shape[0]
    # Zeros, for entries that offsets of a GPU tensor, which nothing checks, leave out.
    counts = torch.zeros(entries, dtype=torch.int64, device=weights.device)
    block = min(MAX_BLOCK, max(32, triton.next_power_of_2(entries)))
    with on_device_of(weights):
        _allocate[(segments,)](
            weights.contiguous(),
            cu_seqlens.contiguous(),
            total.contiguous(),
            None if cap is None else cap.contiguous(),
            counts,
            torch.empty_like(counts),
            entries,
            HAS_CAP=cap is not None,
            BLOCK=block,
            num_warps=max(1, min(8, block // 128)),
        )
    return counts
