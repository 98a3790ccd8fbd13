"""Where the videos of records are, and which frames are taken of them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".flv", ".ts", ".gif")
"""Tried, in this order, for a video that is named without one."""

SAMPLINGS = ("uniform", "random", "middle")


def find_media(root: Path, media: str) -> Path | None:
    """The file or frame folder that a record means by ``media``, a path from ``root``, an absolute one, or either
    without its suffix. None where there is nothing."""
    path = root / media
    if path.exists():
        return path
    # Not with_suffix: a video id may hold a dot.
    return next((file for suffix in SUFFIXES if (file := Path(f"{path}{suffix}")).is_file()), None)


def places(sampling: str, seed: int, epoch: int, name: str) -> Callable[[int], np.ndarray] | None:
    """``read_video``'s ``within_step`` for a way of sampling: "uniform" None, "middle" halfway, "random" anywhere, by
    ``seed``, ``epoch`` and ``name`` alone."""
    if sampling == "uniform":
        return None
    if sampling == "middle":
        return lambda n: np.full(n, 0.5)
    digest = hashlib.blake2b(f"{seed}:{epoch}:{name}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).random
