"""What a selection returns: the kept rows, in the packed layout that flash-attn uses."""

from dataclasses import dataclass, field

import torch


@dataclass
class Selection:
    """The vision tokens that a selector kept, packed over segments (one segment a video).

    Rows ``cu_seqlens[s]:cu_seqlens[s+1]`` of ``indices`` and ``tokens`` belong to segment ``s``. Where the counts were
    decided on the device, rows behind ``cu_seqlens[-1]`` are padding: index -1 and a token of zeros.
    """

    indices: torch.Tensor
    """[N] int64, ascending within a segment; rows of the packed axis that was selected from."""
    cu_seqlens: torch.Tensor
    """[S+1] int32, offsets of the segments in ``indices``."""
    tokens: torch.Tensor | None = None
    """[N, D] the kept rows, re-encoded where the selector does that. None: the rows as they were."""
    scores: torch.Tensor | None = None
    """Relevance of every token, kept or not, fp32; [B, M] for dense input, [sum M] for packed. None: the method has
    no scores."""
    rho: torch.Tensor | None = None
    """[S] fp32, the predicted retention ratio of each segment. None: the method predicts no budget."""
    n: torch.Tensor | None = None
    """[S] int64, tokens kept a segment."""
    entropy: torch.Tensor | None = None
    """[S] fp32, entropy in nats of the normalised relevance. None: the method does not use it."""
    n_expected: torch.Tensor | None = None
    """[S] fp32, rho M: tokens that the training gate keeps on average, differentiable. None outside training."""
    extras: tuple[torch.Tensor, ...] = field(default_factory=tuple)
    """Per-token data gathered beside the tokens (timestamps, positions), in the order given."""
    notes: tuple[str, ...] = ()
    """What the selector has to say about this selection, one sentence each."""
