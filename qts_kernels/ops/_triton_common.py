"""What the Triton implementations share: packed segments on the device, and facts about the card.

A packed axis of T rows in S segments is cut into blocks of ``size`` rows that never cross a segment's end. Segment s
owns the blocks from ``cu_seqlens[s] // size + s`` on: that needs no prefix sum and no maximum length, so a grid of
``T // size + S`` programs, which the host knows, covers every segment; a few programs find nothing to do.
"""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def segment_of_block(cu_seqlens, segments, block, size, EACH: tl.constexpr = 1):
    """The largest s with cu_seqlens[s] * EACH // size + s <= block; the last segment where block lies behind them all.
    EACH is how many rows of the blocks one row of cu_seqlens stands for."""
    low = block * 0
    high = low + segments - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) * EACH // size + middle <= block:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def segment_of_rows(cu_seqlens, segments, rows):
    """The segment of each packed row of a vector: the largest s with cu_seqlens[s] <= row."""
    low = rows * 0
    high = low + segments - 1
    width = segments
    while width > 1:
        middle = (low + high + 1) // 2
        inside = tl.load(cu_seqlens + middle) <= rows
        high = tl.where(inside | (low == high), high, middle - 1)
        low = tl.where(inside, middle, low)
        width = (width + 1) // 2
    return low


@triton.jit
def segment_bounds(cu_seqlens, segment, total):
    """First row and length of a segment, kept inside [0, total] whatever the offsets say."""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens + segment), 0), total)
    stop = tl.minimum(tl.maximum(tl.load(cu_seqlens + segment + 1), start), total)
    return start, stop - start


def blocks_of(total: int, segments: int, size: int) -> int:
    """How many programs cover ``segments`` packed segments of ``total`` rows in blocks of ``size``."""
    return total // size + segments


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on the current device: make it that of ``x`` (on the CPU there is only the interpreter)."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def multiprocessors(x: Tensor) -> int:
    """How many programs it takes to give each multiprocessor one; an H200's where there is no card."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def is_amd() -> bool:
    """AMD cards have 64 KiB of shared memory a program and wavefronts of 64."""
    return torch.version.hip is not None


def is_hopper(x: Tensor) -> bool:
    """Hopper multiplies by groups of four warps (wgmma); taken for granted where there is no card."""
    return not is_amd() and (not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] == 9)


def check_dtype(name: str, x: Tensor) -> None:
    """float64 is served by the reference: raise TypeError where it was sent here by force."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name} must be float32 or bfloat16 or float16 in Triton, got {x.dtype}")
