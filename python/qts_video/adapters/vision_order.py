"""The vision tower's features, as they went into the projector, in the order of the prompt's placeholders."""

import torch


def first_copies(features: torch.Tensor, counts: list[int], copies: int) -> torch.Tensor:
    """``features`` of samples that generate() repeated, each of them once.

    Args:
        features: [N, ...], the rows of every sample's copies one after the other; or of every sample once, where it
            was encoded before it was repeated.
        counts: of each sample, how many rows it has.
        copies: of every sample.

    Raises RuntimeError for another number of rows.
    """
    total = sum(counts)
    if len(features) == total:
        return features
    if len(features) != copies * total:
        raise RuntimeError(
            f"the projector was given {len(features)} rows of features, but {len(counts)} samples with {counts} rows "
            f"in {copies} copies were expected"
        )
    blocks = features.split([copies * count for count in counts])
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


def window_order(grid: tuple[int, int, int], side: int) -> torch.Tensor:
    """[T*H*W] int64: the tokens of a video of (T, H, W) tokens in the order of its windows, which are ``side`` tokens
    high and wide and never more than one step long: window after window, row by row in each."""
    steps, rows, columns = grid
    across = -(-columns // side)
    window = (torch.arange(rows) // side).unsqueeze(1) * across + torch.arange(columns) // side
    window = window + torch.arange(steps).view(-1, 1, 1) * rows * across
    return window.flatten().argsort(stable=True)
