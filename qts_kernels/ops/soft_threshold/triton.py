"""Soft threshold: one program a segment, safeguarded Newton steps in the reference's bracket.

The sum of sigmoids is taken as a count of the scores above t, which is exact, and small corrections:
    sigmoid(z) = [z > 0] - sign(z) sigmoid(-|z|).
So a root in a gap between scores, where the gates are saturated and the corrections tiny, is found to fp32 as well.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops._triton_common import on_device_of, segment_bounds

# Halving alone takes a bracket of any width in fp32 to neighbouring numbers in fewer steps than this.
_STEPS = tl.constexpr(200)
BLOCK = 4096


@triton.jit
def _excess(scores, start, length, t, target, inverse_tau, BLOCK: tl.constexpr):
    """sum sigmoid((r - t) / tau) - target, and minus its derivative times tau, in fp64 from fp32 terms."""
    above = tl.zeros([BLOCK], tl.int32)
    correction = tl.zeros([BLOCK], tl.float32)
    slope = tl.zeros([BLOCK], tl.float32)
    for first in range(0, length, BLOCK):
        position = first + tl.arange(0, BLOCK)
        inside = position < length
        z = (tl.load(scores + start + position, mask=inside, other=0) - t) * inverse_tau
        small = tl.exp(-tl.abs(z))
        tail = small / (1.0 + small)
        above += (inside & (z > 0)).to(tl.int32)
        correction += tl.where(inside, tl.where(z > 0, -tail, tail), 0.0)
        slope += tl.where(inside, tail / (1.0 + small), 0.0)
    excess = tl.sum(above, 0).to(tl.float64) - target + tl.sum(correction.to(tl.float64), 0)
    return excess, tl.sum(slope.to(tl.float64), 0)


@triton.jit(do_not_specialize=["total"])
def _soft_threshold(scores, rho, cu_seqlens, out, total, tau, BLOCK: tl.constexpr):
    segment = tl.program_id(0)
    start, length = segment_bounds(cu_seqlens, segment, total)
    share = tl.load(rho + segment)
    smallest = tl.full([BLOCK], float("inf"), tl.float32)
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, length, BLOCK):
        position = first + tl.arange(0, BLOCK)
        inside = position < length
        score = tl.load(scores + start + position, mask=inside, other=0)
        smallest = tl.minimum(smallest, tl.where(inside, score, float("inf")))
        largest = tl.maximum(largest, tl.where(inside, score, -float("inf")))
        bad |= (score != score).to(tl.int32)
    # With t = min(r) - tau logit(rho) every term is at least rho, with max(r) at most: the root lies between.
    logit = tl.log(share.to(tl.float64)) - tl.log(1.0 - share.to(tl.float64))
    low = (tl.min(smallest, 0) - tau * logit).to(tl.float32)
    high = (tl.max(largest, 0) - tau * logit).to(tl.float32)
    target = share.to(tl.float64) * length
    t = 0.5 * low + 0.5 * high
    step = 0
    # Newton where its step stays in the bracket and the bracket shrinks by half every other step, else halving.
    width = high - low
    while (step < _STEPS) & (high > low) & (t >= low) & (t <= high):
        excess, slope = _excess(scores, start, length, t, target, 1.0 / tau, BLOCK)
        low = tl.where(excess > 0, t, low)
        high = tl.where(excess > 0, high, t)
        newton = (t + tau * (excess / tl.maximum(slope, 1e-300))).to(tl.float32)
        middle = 0.5 * low + 0.5 * high
        halving = (newton <= low) | (newton >= high) | ((step % 2 == 1) & (high - low > 0.5 * width))
        following = tl.where(halving, middle, newton)
        width = tl.where(step % 2 == 1, high - low, width)
        done = (tl.abs(following - t) <= 6e-8 * tl.abs(t)) & (tl.abs(newton - t) <= 6e-8 * tl.abs(t))
        done = done | (excess == 0) | (following == low) | (following == high)
        t = tl.where(excess == 0, t, following)
        step = tl.where(done, _STEPS, step + 1)
    t = tl.where(share <= 0, float("inf"), tl.where(share >= 1, -float("inf"), t))
    t = tl.where((tl.max(bad, 0) > 0) | (share != share), float("nan"), t)
    tl.store(out + segment, tl.where(length == 0, 0.0, t))


def soft_threshold(scores: Tensor, rho: Tensor, cu_seqlens: Tensor, tau: float) -> Tensor:
    """See ``qts_kernels.soft_threshold``."""
    if scores.dtype != torch.float32:
        raise TypeError(f"scores must be float32 in Triton, got {scores.dtype}")
    out = torch.empty_like(rho)
    block = min(BLOCK, max(128, triton.next_power_of_2(scores.shape[0])))
    with on_device_of(scores):
        _soft_threshold[(rho.shape[0],)](
            scores.contiguous(),
            rho.contiguous(),
            cu_seqlens.contiguous(),
            out,
            scores.shape[0],
            tau,
            BLOCK=block,
            num_warps=max(1, block // 256),
        )
    return out
