"""Samples that know their number in the data set, so that what is drawn for a sample does not depend on the batch, the
process or the worker that it comes through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch.utils.data import Dataset

NUMBER = "sample_number"
"""In a batch: int64 [B]."""


@dataclass(frozen=True)
class NumberedSample:
    number: int
    sample: Any


class Numbered(Dataset):
    """A data set's samples with their numbers. Raises TypeError for one that has none."""

    def __init__(self, dataset: Any) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"expected a data set with a length and samples by number, got {type(dataset).__name__}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> NumberedSample:
        return NumberedSample(number, self.dataset[number])

    def set_epoch(self, epoch: int) -> None:
        """Passed on to a data set that wants it; accelerate calls this."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


class NumberedCollator:
    """``collator``, whose batches of numbered samples hold their numbers. Others it leaves as they are."""

    def __init__(self, collator: Callable[[Sequence[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        if not isinstance(samples[0], NumberedSample):
            return dict(self.collator(samples))
        batch = dict(self.collator([one.sample for one in samples]))
        return batch | {NUMBER: torch.tensor([one.number for one in samples])}


def mix(*numbers: int) -> int:
    """A seed in [0, 2^62) that these numbers give, the same everywhere."""
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
