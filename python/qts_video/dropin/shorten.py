"""Taking the dropped tokens out of a prefill: which columns stay, and everything the decoder is given,
gathered by them."""

from dataclasses import dataclass

import torch

from qts_video.dropin.checks import Kept
from qts_video.dropin.layout import Layout


@dataclass(frozen=True)
class Columns:
    """The columns of a shortened prefill: B samples, L columns before and K after."""

    source: torch.Tensor
    """[B, K] int64: the column before, -1 in padding."""
    kept_rows: torch.Tensor
    """[N] int64: of every kept video token, its row of the flattened B*K axis, in the order of the
    selection."""
    padded: bool
    """Whether any of the K columns is padding."""

    def repeat(self, copies: int) -> "Columns":
        """The same for a batch in which every sample is repeated ``copies`` times, row by row: ``kept_rows`` are then
        those of every first copy, of every second one, and so on."""
        length = self.source.shape[1]
        sample, column = self.kept_rows // length * copies, self.kept_rows % length
        copy = torch.arange(copies, device=sample.device).unsqueeze(1)
        rows = ((sample + copy) * length + column).flatten()
        return Columns(self.source.repeat_interleave(copies, 0), rows, self.padded)

    @property
    def mask(self) -> torch.Tensor:
        """[B, K] bool, false in padding."""
        return self.source >= 0

    def gather(self, values: torch.Tensor, fill: int | None = None) -> torch.Tensor:
        """Gather ``values`` [..., B, L] along its last axis: [..., B, K]. Padding repeats column 0, or is
        ``fill``."""
        index = self.source.to(values.device).clamp(min=0).expand(*values.shape[:-1], -1)
        gathered = values.gather(-1, index)
        return gathered if fill is None else gathered.masked_fill(~self.mask.to(values.device), fill)

    def gather_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Gather ``tokens`` [B, L, D] along L: [B, K, D]. Padding repeats column 0. Differentiable."""
        batch, length, width = tokens.shape
        start = torch.arange(0, batch * length, length, device=tokens.device).unsqueeze(1)
        rows = (self.source.clamp(min=0) + start).flatten()
        return tokens.reshape(batch * length, width).index_select(0, rows).view(batch, -1, width)


def kept_columns(layout: Layout, kept: Kept) -> Columns:
    """The columns that stay: all text and images but what is lost with time steps, the selected video tokens and their
    newlines, padded to the longest sample.

    Samples end together where they did before (left padding), else they start together.
    """
    batch, length, device = layout.batch, layout.columns, kept.indices.device
    keep = layout.valid.clone()
    keep.view(-1)[torch.cat([layout.rows, layout.newline_rows])] = False
    if kept.lost is not None:
        keep &= ~kept.lost
    total = keep.sum(1)
    total.index_add_(0, torch.tensor(layout.sample), torch.tensor(kept.counts) + torch.tensor(kept.newline_counts))
    longest = int(total.max())
    left = bool(layout.valid[:, -1].all())

    # From here on the device: which column goes where, without ever reading the indices back.
    keep = keep.to(device)
    selected = layout.rows.to(device).index_select(0, kept.indices)
    keep.view(-1).index_fill_(0, selected, True)
    keep.view(-1).index_copy_(0, layout.newline_rows.to(device), kept.newlines)
    place = keep.cumsum(1) - 1
    if left:
        place += (longest - total).to(device).unsqueeze(1)
    # Dropped columns all go to a spare one behind the last.
    source = torch.full((batch, longest + 1), -1, device=device)
    source.scatter_(1, place.where(keep, longest), torch.arange(length, device=device).expand(batch, -1))
    rows = place.view(-1).index_select(0, selected) + selected // length * longest
    return Columns(source[:, :longest].contiguous(), rows, padded=bool((total != longest).any()))
