"""Packed segments, worked out on their device: nothing is copied from the host, nothing synchronises."""

import torch
from torch import Tensor


def uniform_cu_seqlens(segments: int, length: int, device: torch.device) -> Tensor:
    """int32 [segments+1]: the cu_seqlens of a dense batch."""
    if length == 0:
        return torch.zeros(segments + 1, dtype=torch.int32, device=device)
    return torch.arange(0, segments * length + 1, length, dtype=torch.int32, device=device)


def segment_ids(cu_seqlens: Tensor, rows: int) -> Tensor:
    """int64 [rows]: the segment of each packed row; S, one past the last, behind ``cu_seqlens[-1]``."""
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, row, right=True) - 1
