"""What a selector returns is checked before anything is dropped by it."""

from dataclasses import dataclass
from itertools import pairwise

import torch

from qts_kernels import Selection
from qts_video.dropin.empty_steps import step_of_tokens
from qts_video.dropin.layout import Layout
from qts_video.dropin.newlines import kept_newlines
from qts_video.methods.base import Videos


@dataclass(frozen=True)
class Kept:
    """A checked selection: what stays of the videos of a prefill."""

    indices: torch.Tensor
    """[N] int64: rows of the packed video axis, without padding."""
    counts: list[int]
    """How many of them are of each video."""
    newlines: torch.Tensor
    """[sum newlines] bool: which newline tokens stay."""
    newline_counts: list[int]
    """How many of them are of each video."""
    steps: list[bool] | None = None
    """Of each time step of each video, whether it keeps a token; None where nobody asked."""
    lost: torch.Tensor | None = None
    """[B, L] bool on the CPU: columns that go besides tokens and newlines. None: no column does."""
    notes: tuple[str, ...] = ()
    """What there is to say about them."""


def check_selection(selection: Selection, videos: Videos, layout: Layout, name: str, ask_steps: bool = False) -> Kept:
    """What is kept of each video, its counts read from the device in the one synchronisation of a prefill's
    selection; where ``ask_steps``, also which time steps keep a token.

    Rows of ``selection.indices`` behind ``cu_seqlens[-1]`` must be -1.

    Raises:
        TypeError: not a Selection, or a tensor of the wrong dtype.
        ValueError: a wrong shape or device, counts that are none, or indices that are not ascending rows of
            their own video.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"{name}: select() must return a Selection, got {type(selection).__name__}")
    tokens, number = videos.tokens, len(videos.lengths)
    indices, cu_seqlens = selection.indices, selection.cu_seqlens
    _check_tensor(f"{name}: indices", indices, [None], torch.int64, tokens.device)
    _check_tensor(f"{name}: cu_seqlens", cu_seqlens, [number + 1], torch.int32, tokens.device)
    if selection.tokens is not None:
        shape = [len(indices), tokens.shape[1]]
        _check_tensor(f"{name}: tokens", selection.tokens, shape, tokens.dtype, tokens.device)
    scores = selection.scores
    if scores is not None and scores.numel() != len(tokens):
        raise ValueError(
            f"{name}: scores must have one entry for each of {len(tokens)} tokens, got {list(scores.shape)}"
        )

    newlines, newline_counts = kept_newlines(layout, indices, videos.cu_seqlens)
    facts = _facts(indices, cu_seqlens, videos)
    steps = _kept_steps(layout, indices) if ask_steps else newline_counts[:0]
    read = torch.cat([steps, newline_counts, cu_seqlens.long(), facts]).tolist()
    steps, read = [kept > 0 for kept in read[: len(steps)]], read[len(steps) :]
    newline_counts, (*offsets, in_video, ascending, cut) = read[:number], read[number:]
    counts = [end - start for start, end in pairwise(offsets)]
    if offsets[0] != 0 or min(counts) < 0 or offsets[-1] > len(indices):
        raise ValueError(f"{name}: cu_seqlens must rise from 0 to at most {len(indices)} = len(indices), got {offsets}")
    if not in_video:
        raise ValueError(f"{name}: the indices of a video must be rows of its own segment of the packed axis")
    if not ascending:
        raise ValueError(f"{name}: indices must be strictly ascending in each video")
    if not cut:
        raise ValueError(
            f"{name}: indices behind cu_seqlens[-1] = {offsets[-1]} must be -1 ({len(indices)} were given)"
        )
    if offsets[-1] == 0:
        raise ValueError(f"{name}: selected none of {len(tokens)} video tokens")
    return Kept(indices[: offsets[-1]], counts, newlines, newline_counts, steps if ask_steps else None)


def _kept_steps(layout: Layout, indices: torch.Tensor) -> torch.Tensor:
    """[sum T] int64 on the device: 1 where a time step keeps a token."""
    of_token = step_of_tokens(layout).to(indices.device)
    kept = torch.zeros(sum(map(len, layout.frame_spans)) + 1, dtype=torch.int64, device=indices.device)
    used = (indices >= 0) & (indices < len(of_token))  # what is out of range is refused below
    step = of_token.index_select(0, indices.clamp(0, len(of_token) - 1)).where(used, len(kept) - 1)
    return kept.index_fill_(0, step, 1)[:-1]


def _facts(indices: torch.Tensor, cu_seqlens: torch.Tensor, videos: Videos) -> torch.Tensor:
    """[3] int64 on the device: every index in its own segment, ascending, and -1 behind the last segment."""
    position = torch.arange(len(indices), device=indices.device)
    used = position < cu_seqlens[-1]
    segment = torch.searchsorted(cu_seqlens[1:].long(), position, right=True).clamp(max=len(cu_seqlens) - 2)
    first, end = videos.cu_seqlens[segment], videos.cu_seqlens[segment + 1]
    in_video = ((indices >= first) & (indices < end)) | ~used
    ascending = (indices[1:] > indices[:-1]) | ~used[1:]
    cut = (indices == -1) | used
    return torch.stack([in_video.all(), ascending.all(), cut.all()]).long()


def _check_tensor(
    what: str, tensor: torch.Tensor, shape: list[int | None], dtype: torch.dtype, device: torch.device
) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != dtype:
        raise TypeError(f"{what} must be a tensor of {dtype}, got {getattr(tensor, 'dtype', type(tensor).__name__)}")
    wanted = ["N" if size is None else size for size in shape]
    if tensor.ndim != len(shape) or any(size not in (None, got) for size, got in zip(shape, tensor.shape, strict=True)):
        raise ValueError(f"{what} must have shape {wanted}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{what} must be on {device}, where the tokens are, got {tensor.device}")
