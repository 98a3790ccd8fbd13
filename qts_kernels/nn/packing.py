"""Dense batches with masks as packed rows, without a synchronisation: shapes never depend on what a mask holds."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qts_kernels._segments import uniform_cu_seqlens


@dataclass(frozen=True)
class Packed:
    """Rows of S segments. What a mask hides is in none: in packed order it comes behind the last one."""

    rows: Tensor
    """[T, D] in the caller's order; a view of what the caller gave."""
    cu_seqlens: Tensor
    """int32 [S+1], offsets in packed order; ``cu_seqlens[-1] <= T``."""
    order: Tensor | None
    """int64 [T]: the row at each packed place. None: the rows are in packed order already."""
    max_seqlen: int
    """At least the longest segment."""

    def pack(self, x: Tensor) -> Tensor:
        """[T, ...] in the caller's order -> packed order."""
        return x if self.order is None else x.index_select(0, self.order)

    def unpack(self, x: Tensor) -> Tensor:
        """[T, ...] in packed order -> the caller's."""
        return x if self.order is None else torch.empty_like(x).index_copy(0, self.order, x)

    def rows_at(self, places: Tensor) -> Tensor:
        """The caller's rows at packed ``places``; -1 stays -1."""
        if self.order is None or places.shape[0] == 0:
            return places
        return torch.where(places < 0, -1, self.order[places.clamp(min=0)])


def pack(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Packed:
    """``x`` [B, T, D] with an optional bool ``mask`` [B, T] (True: counts), or [sum T, D] with ``cu_seqlens``."""
    if cu_seqlens is not None:
        return Packed(x, cu_seqlens, None, x.shape[0])
    segments, length = x.shape[:2]
    if mask is None:
        return Packed(x.flatten(0, 1), uniform_cu_seqlens(segments, length, x.device), None, length)
    counts = mask.sum(1).cumsum(0)
    order = (~mask).flatten().to(torch.uint8).argsort(stable=True)
    return Packed(x.flatten(0, 1), F.pad(counts, (1, 0)).int(), order, length)


def join(text: Packed, vision: Packed) -> tuple[Tensor, Tensor, int]:
    """cu_seqlens of both for one op, and how many segments at their end hold what the masks hide.

    Hidden vision rows become a segment without question, hidden question rows one without vision: neither can reach
    anything, and every row belongs to a segment.
    """
    if text.order is None and vision.order is None:
        return text.cu_seqlens, vision.cu_seqlens, 0
    cu_text = F.pad(torch.cat([text.cu_seqlens, text.cu_seqlens[-1:]]), (0, 1), value=text.rows.shape[0])
    cu_vision = F.pad(vision.cu_seqlens, (0, 2), value=vision.rows.shape[0])
    return cu_text, cu_vision, 2
