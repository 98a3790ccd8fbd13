"""What the last selection kept, and what it took: ``handle.last``."""

from dataclasses import dataclass
from functools import cached_property

import torch

from qts_video.dropin.checks import Kept
from qts_video.dropin.layout import Layout
from qts_video.dropin.stopwatch import Stopwatch


@dataclass(frozen=True)
class VideoReport:
    """What was kept of one video, T x H x W tokens after the merger. Everything is on the CPU."""

    sample: int
    """Its row in the batch (which generate() was given: copies for beams or several sequences don't
    count)."""
    grid: tuple[int, int, int]
    """(T, H, W): time steps, rows, columns."""
    indices: torch.Tensor
    """[n] int64, ascending: the kept tokens' indices in the video."""
    frame: torch.Tensor
    """[n] int64: step of the temporal grid; one step is ``temporal_patch_size`` frames."""
    row: torch.Tensor
    """[n] int64"""
    column: torch.Tensor
    """[n] int64"""
    seconds: torch.Tensor
    """[n] float32: time of each kept token from the start of the video."""
    frame_seconds: torch.Tensor
    """[T] float32: time of each step of the temporal grid."""
    scores: torch.Tensor | None
    """[T*H*W] float32: relevance of every token, kept or not. None: the method has no scores."""
    newlines: int = 0
    """Newline tokens of the video before selection: not in ``indices``, but in ``total``."""
    kept_newlines: int = 0
    """Newline tokens that stayed with their tokens: not in ``indices``, but in ``kept``."""

    @property
    def total(self) -> int:
        """Tokens before selection, newlines among them."""
        return self.grid[0] * self.grid[1] * self.grid[2] + self.newlines

    @property
    def kept(self) -> int:
        """Tokens after selection, newlines among them."""
        return len(self.indices) + self.kept_newlines

    @property
    def retention_ratio(self) -> float:
        """kept / total."""
        return self.kept / self.total


class Report:
    """The selection of one prefill. Tensors are brought to the CPU when they are first asked for."""

    def __init__(
        self,
        *,
        selector: str,
        positions: str,
        layout: Layout,
        kept: Kept,
        scores: torch.Tensor | None,
        timestamps: torch.Tensor,
        seconds_from: str,
        columns: torch.Tensor,
        stopwatch: Stopwatch,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.selector = selector
        """The method's name."""
        self.positions = positions
        """"original" or "compact"."""
        self.seconds_from = seconds_from
        """Who said when the steps of the temporal grid are. "given": ``Handle.seconds_per_step``; "prompt": the time
        labels in the prompt; "inputs": the call; "default": nobody, and the model's own assumption was taken."""
        self.notes = notes
        """What the method has to say about this selection, one sentence each."""
        self._layout, self._kept = layout, kept
        self._timestamps = timestamps.detach()
        self._scores = None if scores is None else scores.detach().reshape(-1)
        self._columns = columns
        self._stopwatch = stopwatch

    @property
    def total(self) -> int:
        """Video tokens before selection, of all videos, newlines among them."""
        return sum(self._layout.lengths) + sum(self._layout.newlines)

    @property
    def kept(self) -> int:
        """Video tokens after selection, of all videos, newlines among them."""
        return sum(self._kept.counts) + sum(self._kept.newline_counts)

    @property
    def retention_ratio(self) -> float:
        """kept / total."""
        return self.kept / self.total

    @property
    def timings(self) -> dict[str, float]:
        """Seconds of "vision" (the vision tower, images included), "selection" and "prefill" (the decoder).

        On a GPU, reading this waits for the prefill to end.
        """
        return {"vision": 0.0, "selection": 0.0, "prefill": 0.0} | self._stopwatch.seconds()

    @cached_property
    def columns(self) -> torch.Tensor:
        """[B, K] int64: the column of ``input_ids`` that each of the K columns of the logits belongs to; -1
        in padding."""
        return self._columns.cpu()

    @cached_property
    def videos(self) -> list[VideoReport]:
        """One report a video, in the order of the placeholders."""
        indices, seconds = self._kept.indices.cpu(), self._timestamps.float().cpu()
        scores = None if self._scores is None else self._scores.float().cpu()
        layout, reports, first, start = self._layout, [], 0, 0
        newlines = zip(layout.newlines, self._kept.newline_counts, strict=True)
        for sample, grid, count, (before, after) in zip(
            layout.sample, layout.grids, self._kept.counts, newlines, strict=True
        ):
            frames, rows, columns = grid
            total = frames * rows * columns
            kept = indices[first : first + count] - start
            of_video = slice(start, start + total)
            reports.append(
                VideoReport(
                    sample=sample,
                    grid=grid,
                    indices=kept,
                    frame=kept // (rows * columns),
                    row=kept // columns % rows,
                    column=kept % columns,
                    seconds=seconds[of_video][kept],
                    frame_seconds=seconds[of_video][:: rows * columns],
                    scores=None if scores is None else scores[of_video],
                    newlines=before,
                    kept_newlines=after,
                )
            )
            first, start = first + count, start + total
        return reports

    def __str__(self) -> str:
        lines = [f"{'video':>5}  {'sample':>6}  {'grid':>12}  {'seconds':>9}  {'tokens':>7}  {'kept':>7}  {'ratio':>6}"]
        for number, video in enumerate(self.videos):
            grid = "x".join(map(str, video.grid))
            lines.append(
                f"{number:>5}  {video.sample:>6}  {grid:>12}  {video.frame_seconds[-1]:>9.2f}  {video.total:>7}  "
                f"{video.kept:>7}  {video.retention_ratio:>6.1%}"
            )
        times = ", ".join(f"{stage} {seconds:.3f} s" for stage, seconds in self.timings.items())
        lines.append(
            f"{self.selector}: {self.kept} of {self.total} video tokens kept ({self.retention_ratio:.1%}), "
            f"{self.positions} positions; {times}"
        )
        lines += self.notes
        return "\n".join(lines)
