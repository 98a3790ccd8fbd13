"""What a key-value cache must remember once tokens were dropped from it: the caller still counts them."""

from dataclasses import dataclass
from typing import Any

import torch

_ATTRIBUTE = "_qts_video_dropped"


@dataclass(frozen=True)
class Dropped:
    """Rides on the Cache object of a shortened prefill; what is fed to the cache later is translated by
    it."""

    seen: int
    """Columns of the sequence up to the end of that prefill, as the caller counts them."""
    mask: torch.Tensor
    """[B, K] bool: of the K cache slots filled by then, those that hold a token and no padding."""
    padded: bool
    """Whether any of those slots is padding."""
    next_position: torch.Tensor
    """[B] int64: the rotary position of each sample's next token."""
    shift: torch.Tensor | None
    """[B] int64: how far a caller's position ids are ahead of ours. None: they are the same ("original")."""

    @property
    def kept(self) -> int:
        return self.mask.shape[1]

    @property
    def removed(self) -> int:
        return self.seen - self.kept

    @property
    def callers_next_position(self) -> torch.Tensor:
        """[B] int64: what the caller takes each sample's next position to be."""
        return self.next_position if self.shift is None else self.next_position + self.shift

    def mask_2d(self, mask: torch.Tensor | None, fed: int, dtype: torch.dtype = torch.int64) -> torch.Tensor | None:
        """The mask over our slots, given the caller's mask [B, seen + later columns] or None, where ``fed``
        columns came later.

        None stays None where no slot is padding.
        """
        if mask is not None:
            return torch.cat([self.mask.to(mask.device, mask.dtype), mask[:, self.seen :]], dim=1)
        if not self.padded:
            return None
        later = torch.ones(self.mask.shape[0], fed, dtype=dtype, device=self.mask.device)
        return torch.cat([self.mask.to(dtype), later], dim=1)


def remember(cache: Any, dropped: Dropped) -> None:
    """Put ``dropped`` on ``cache``."""
    setattr(cache, _ATTRIBUTE, dropped)


def recall(cache: Any) -> Dropped | None:
    """What was dropped from ``cache``, or None where nothing was."""
    return getattr(cache, _ATTRIBUTE, None)


def forget_if_reset(cache: Any) -> None:
    """Forget what was dropped where the cache was emptied since (``cache.reset()``). May synchronise: for
    prefills only."""
    if recall(cache) is not None and int(cache.get_seq_length()) == 0:
        delattr(cache, _ATTRIBUTE)
