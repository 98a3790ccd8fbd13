"""Where the videos of a prompt are: found once on the host, before the model runs."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """The videos of one prefill of B samples and L columns. Host data only: reading it never synchronises."""

    input_ids: torch.Tensor
    """[B, L] int64, on the CPU."""
    valid: torch.Tensor
    """[B, L] bool: the columns that are not padding."""
    rows: torch.Tensor
    """[sum M] int64: of every video token, its row of the flattened B*L axis, video after video in the order
    of the placeholders."""
    grids: list[tuple[int, int, int]]
    """(time steps, rows, columns) of each video."""
    lengths: list[int]
    """Tokens of each video that a selector chooses from: the product of its grid."""
    sample: list[int]
    """The batch row of each video."""
    frame_spans: list[torch.Tensor]
    """Of each video, [T, 2] int64: first column, and column behind the last, of each time step in its sample:
    its tokens, its newlines, and the tags that the prompt puts around every step."""
    newline_rows: torch.Tensor
    """[sum N] int64: of every newline token of the videos, its row of the flattened B*L axis."""
    newline_spans: list[int]
    """Of each video, how many successive tokens share a newline behind them (those of a grid row, of a frame, or
    of the whole video); 0 where it has no newlines."""
    step_seconds: list[torch.Tensor] | None = None
    """Of each video, [T] float32: when its time steps are, in seconds, where the prompt says it."""

    @property
    def batch(self) -> int:
        return self.valid.shape[0]

    @property
    def columns(self) -> int:
        return self.valid.shape[1]

    @property
    def newlines(self) -> list[int]:
        """Newline tokens of each video."""
        spans = zip(self.lengths, self.newline_spans, strict=True)
        return [length // span if span else 0 for length, span in spans]

    def per_sample(self, of_videos: list[int]) -> list[int]:
        """Numbers of the videos, added up for each sample."""
        totals = [0] * self.batch
        for number, sample in zip(of_videos, self.sample, strict=True):
            totals[sample] += number
        return totals

    def in_steps(self, sample: int) -> torch.Tensor:
        """[L] bool: the columns of a sample that belong to time steps of its videos, the tags around them included."""
        inside = torch.zeros(self.columns, dtype=torch.bool)
        for spans, of in zip(self.frame_spans, self.sample, strict=True):
            if of == sample:
                inside[int(spans[0, 0]) : int(spans[-1, 1])] = True
        return inside


def locate_videos(
    input_ids: torch.Tensor,
    valid: torch.Tensor,
    video_token_id: int,
    grids: list[tuple[int, int, int]],
    *,
    placeholders: torch.Tensor | None = None,
    newline_spans: list[int] | None = None,
    closing_tags: int = 0,
) -> Layout:
    """Match the placeholders of ``input_ids`` [B, L] with the videos' grids, in order.

    Args:
        input_ids: [B, L] int64 on the CPU.
        valid: [B, L] bool on the CPU, false where the prompt is padded.
        video_token_id: the placeholder, of newlines too.
        grids: (time steps, rows, columns) of each video after the merger, sample after sample.
        placeholders: [B, L] bool, which placeholders are of videos; None: all, as the token stands for nothing else.
        newline_spans: see ``Layout.newline_spans``; None where no video has newlines.
        closing_tags: tokens behind every time step that belong to it; what else stands between two steps belongs
            to the later one.

    Raises:
        ValueError: a placeholder is masked, or a sample's placeholders are not those of a whole number of its
            videos.
    """
    placeholder = input_ids == video_token_id if placeholders is None else placeholders
    if bool((placeholder & ~valid).any()):
        raise ValueError("attention_mask is 0 on video placeholders; mask only padding, selection drops the rest")
    lengths = [t * h * w for t, h, w in grids]
    spans = [0] * len(grids) if newline_spans is None else newline_spans
    totals = [length + (length // span if span else 0) for length, span in zip(lengths, spans, strict=True)]
    sample, video = [], 0
    for row, count in enumerate(placeholder.sum(1).tolist()):
        first, left = video, count
        while left > 0 and video < len(grids):
            left -= totals[video]
            sample.append(row)
            video += 1
        if left != 0:
            raise ValueError(
                f"sample {row} has {count} video placeholders, but its videos' grids {grids[first:video]} "
                f"(time, rows, columns after the merger) make {count - left} tokens"
            )
    if video != len(grids):
        raise ValueError(f"{len(grids)} video grids were given, but input_ids hold placeholders for {video}")
    rows = placeholder.flatten().nonzero().squeeze(1)
    content, newlines, frame_spans = [], [], []
    for of_video, grid, length, span in zip(rows.split(totals), grids, lengths, spans, strict=True):
        is_newline = _newline_mask(length, span)
        content.append(of_video[~is_newline])
        newlines.append(of_video[is_newline])
        frame_spans.append(_frame_spans(of_video % input_ids.shape[1], is_newline, grid, closing_tags))
    return Layout(
        input_ids=input_ids,
        valid=valid,
        rows=torch.cat(content) if content else rows,
        grids=grids,
        lengths=lengths,
        sample=sample,
        frame_spans=frame_spans,
        newline_rows=torch.cat(newlines) if newlines else rows[:0],
        newline_spans=spans,
    )


def _newline_mask(length: int, span: int) -> torch.Tensor:
    """[tokens] bool: which of a video's placeholders are newlines, one behind every ``span`` tokens."""
    if span == 0:
        return torch.zeros(length, dtype=torch.bool)
    mask = torch.zeros(length // span, span + 1, dtype=torch.bool)
    mask[:, -1] = True
    return mask.flatten()


def _frame_spans(
    columns: torch.Tensor, is_newline: torch.Tensor, grid: tuple[int, int, int], closing_tags: int
) -> torch.Tensor:
    """[T, 2]: see ``Layout.frame_spans``. ``columns`` are those of all placeholders of the video."""
    first = columns[~is_newline].view(grid[0], -1)[:, 0].contiguous()
    # The last placeholder before the next step's first: a newline belongs to the step that it ends.
    last = columns[torch.searchsorted(columns, first[1:]) - 1]
    stop = torch.cat([last + 1 + closing_tags, columns[-1:] + 1 + closing_tags])
    # The tags before the first step are as long as the shortest of the others: nothing else tells where they start.
    lead = int((first[1:] - stop[:-1]).min()) if grid[0] > 1 else 0
    start = torch.cat([first[:1] - lead, stop[:-1]])
    return torch.stack([start, stop], 1)


def to_host(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Integer tensors on the CPU as int64, in one transfer for all that share a device."""
    host = {}
    for device in {tensor.device for tensor in tensors.values()}:
        here = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        flat = torch.cat([tensor.reshape(-1).long() for tensor in here.values()]).cpu()
        parts = flat.split([tensor.numel() for tensor in here.values()])
        host |= {name: part.view(tensor.shape) for (name, tensor), part in zip(here.items(), parts, strict=True)}
    return host
