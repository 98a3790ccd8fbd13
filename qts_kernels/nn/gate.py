"""The training gate of QTSplus (arXiv 2511.11910): which tokens a step keeps, and how the loss reaches the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qts_kernels._checks import check_shape, check_tensor
from qts_kernels._segments import segment_ids
from qts_kernels.nn.packing import Packed
from qts_kernels.ops.soft_threshold.api import soft_threshold

# splitmix64 (Steele, Lea and Flood 2014), its constants as signed integers; int64 products wrap.
_STEP, _MIX1, _MIX2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_UNIFORM_BITS = 23


@dataclass(frozen=True)
class Gate:
    """The gates of one step: 1 where a token is kept and 0 where it is dropped, with the gradient of the probability to
    keep it (straight-through), for the kept tokens and for the dropped ones."""

    value: Tensor
    """g = hard + p - p.detach() [T] in packed order, fp32 (float64 for float64)."""
    vision: Packed
    """All tokens."""


def keep_logits(scores: Tensor, rho: Tensor, tau: float, cu_seqlens: Tensor) -> Tensor:
    r"""(r - t) / tau, where t solves :math:`\sum_i \sigma((r_i - t) / \tau) = \rho M` in each segment.

    Args:
        scores: r, fp32 [M] packed (float64 for float64).
        rho: [S] in (0, 1]; 1, at which t would be infinite, is taken as the number below it.
        tau: temperature, in units of the scores.
        cu_seqlens: int32 [S+1].

    Returns:
        [M]. Their sigmoids are the probabilities to keep, and sum to rho M. Differentiable in scores and rho.
    """
    t = soft_threshold(scores, rho.clamp(max=1 - torch.finfo(rho.dtype).eps), tau, cu_seqlens=cu_seqlens)
    return (scores - t[segment_ids(cu_seqlens, scores.shape[0])]) / tau


def straight_through(logits: Tensor, places: Tensor) -> Tensor:
    """Gates [M]: 1 at ``places`` (int64, -1 in padding) and 0 elsewhere, with the gradient of sigmoid(logits)."""
    hard = logits.new_zeros(logits.shape[0] + 1).index_fill(0, places.where(places >= 0, logits.shape[0]), 1)[:-1]
    probability = torch.sigmoid(logits)
    return hard + (probability - probability.detach())  # the bracket is exactly 0


def logistic_noise(seeds: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """Logistic noise fp32 [rows] that depends on nothing but each segment's seed and the place in the segment: neither
    on the other segments nor on the device. P(noise > -x) = sigmoid(x).

    Args:
        seeds: int64 [S]. cu_seqlens: int32 [S+1], every row in a segment.
    """
    segment = segment_ids(cu_seqlens, rows)
    place = torch.arange(rows, device=seeds.device) - cu_seqlens[segment]
    bits = _shift_right(_mix(_mix(seeds)[segment] + (place + 1) * _STEP), 64 - _UNIFORM_BITS)
    # The middle of one of 2^23 cells: exact in fp32, and never 0 or 1.
    uniform = (bits.float() + 0.5) * 2.0**-_UNIFORM_BITS
    return uniform.log() - (-uniform).log1p()


def segment_seeds(seed: int | Tensor | None, segments: int, device: torch.device) -> Tensor:
    """int64 [S]: of each segment, from one seed for all, or as given; None draws them from torch's generator.

    Raises ValueError or TypeError on anything else.
    """
    if seed is None:
        return torch.randint(2**62, (segments,), device=device)
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, 1, "[S]", (torch.int64,))
        check_shape("seed", seed, (segments,), "[S]")
        return seed.to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int or an int64 tensor [S], got {type(seed).__name__}")
    return _mix(torch.full((1,), seed, device=device)) + torch.arange(segments, device=device)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Of int64, as if it were unsigned."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
