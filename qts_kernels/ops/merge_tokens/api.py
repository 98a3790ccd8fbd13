"""Token merging by bipartite soft matching."""

import torch
from torch import Tensor

import qts_kernels.ops.merge_tokens.register  # noqa: F401
from qts_kernels._checks import check_same, check_shape, check_tensor
from qts_kernels._schemas import statistics_dtype
from qts_kernels.ops.gather_tokens.api import gather_tokens

INTEGERS = (torch.int64, torch.int32)


def merge_tokens(
    frames: Tensor,
    counts: Tensor,
    *,
    sizes: Tensor | None = None,
    max_tokens: int | None = None,
    compat: bool = False,
    with_rows: bool = False,
) -> tuple[Tensor, ...]:
    """Merge the tokens of each frame into exactly ``counts[t]``, by ToMe's matching (arXiv 2210.09461) in rounds.

    A round takes the tokens at even positions and those at odd positions. Each even token finds the odd token with the
    largest cosine similarity; the r even tokens with the largest similarities are merged into theirs, where r is what
    is left to merge, half of the tokens at most. Of equal similarities the lower position counts as larger; NaN is the
    smallest, and a token of zeros has the similarity 0. A merged token is the mean of the frame's tokens in it,
    weighted by their sizes, and stands at the odd token's place: the order of the tokens is kept. The next round
    matches these means.

    Similarities are rounded in float32, so those that nearly tie may fall otherwise on another backend; each gives the
    same bits on every run. On a GPU nothing synchronises where ``max_tokens`` is given or the counts are on the CPU.

    Args:
        frames: [T, N, D]. float32, bfloat16 or float16, matched and added up in float32 (float64 for checking).
        counts: [T] int64 or int32, in [0, N], on the CPU or on the device of ``frames``: tokens to keep of each frame.
            Another value raises on the CPU; on a GPU it is clamped. A frame with a count of 0 has no tokens.
        sizes: [T, N], how many tokens each token stands for, above 0; float32 (float64 where ``frames`` is). Default:
            1 each.
        max_tokens: the number of rows of the result, as for ``resize_frames``. Default: the sum of the counts.
        compat: repeat what QuoTA's release does: each round's means forget the sizes, and the even tokens that stay
            stand, most similar first, before the odd ones. ``sizes`` must be None then.
        with_rows: also return the row of the result that each token went to.

    Returns:
        tokens: [sum, D] (or [max_tokens, D], zeros behind ``cu_seqlens[-1]``). Differentiable in ``frames``, with the
            matching held constant.
        cu_seqlens: int32 [T+1].
        sizes: [sum], the sums of the sizes of what was merged.
        rows: int64 [T, N], only where ``with_rows``; -1 for tokens that are in no row.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices, counts, sizes or max_tokens that do not fit.
    """
    check_tensor("frames", frames, 3, "[T, N, D]")
    check_tensor("counts", counts, 1, "[T]", INTEGERS)
    check_shape("counts", counts, frames.shape[:1], "[T]")
    if counts.device.type != "cpu":
        check_same("counts", counts, "frames", frames, dtype=False)
    if sizes is not None:
        check_tensor("sizes", sizes, 2, "[T, N]", (statistics_dtype(frames),))
        check_shape("sizes", sizes, frames.shape[:2], "[T, N]")
        check_same("sizes", sizes, "frames", frames, dtype=False)
        if compat:
            raise ValueError("sizes must be None where compat is True: the release has none")
        sizes = sizes.detach()
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"max_tokens must not be negative, got {max_tokens}")
    counts = counts.to(torch.int64)
    clamped = counts.clamp(0, frames.shape[1])
    total = int(clamped.sum()) if max_tokens is None else max_tokens
    cu_seqlens = torch.nn.functional.pad(clamped.cumsum(0), (1, 0)).clamp(max=total)
    cu_seqlens = cu_seqlens.to(torch.int32).to(frames.device, non_blocking=True)
    counts = counts.to(frames.device, non_blocking=True)
    tokens, merged_sizes, rows, _ = torch.ops.qts_kernels.merge_tokens(frames, counts, cu_seqlens, sizes, total, compat)
    return (tokens, cu_seqlens, merged_sizes, rows) if with_rows else (tokens, cu_seqlens, merged_sizes)


def merge_step(frames: Tensor, r: int, *, sizes: Tensor | None = None, compat: bool = False) -> tuple[Tensor, Tensor]:
    """One round of ``merge_tokens``: r tokens less in each frame.

    Args:
        frames, sizes, compat: as for ``merge_tokens``; with ``compat`` the tokens stand in the order of ToMe's code.
        r: in [0, N // 2].

    Returns:
        tokens [T, N - r, D], differentiable in ``frames``, and sizes [T, N - r].

    Raises:
        ValueError, TypeError: as ``merge_tokens``, and where r does not fit.
    """
    check_tensor("frames", frames, 3, "[T, N, D]")
    count, length, columns = frames.shape
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    if not 0 <= r <= length // 2:
        raise ValueError(f"r must be in [0, N // 2] = [0, {length // 2}], got {r}")
    counts = torch.full((count,), length - r, dtype=torch.int64, device=frames.device)
    tokens, _, merged = merge_tokens(frames, counts, sizes=sizes, max_tokens=count * (length - r), compat=compat)
    return tokens.view(count, length - r, columns), merged.view(count, length - r)


def merge_rows_columns(frames: Tensor, sizes: Tensor, *, compat: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Merge each frame's grid to a smaller grid: ``merge_tokens`` of every row on its own, then of every column.

    Args:
        frames: [T, h, w, D], dtypes as for ``merge_tokens``.
        sizes: [T, 2] int64 or int32 on the CPU: rows, in [0, h], and columns, in [0, w], of each frame's new grid.
        compat: as for ``merge_tokens``.

    Returns:
        tokens [sum, D] in raster order, frame after frame, cu_seqlens int32 [T+1] and the tokens' sizes [sum].
        Differentiable in ``frames``.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices or sizes that do not fit.
    """
    check_tensor("frames", frames, 4, "[T, h, w, D]")
    check_tensor("sizes", sizes, 2, "[T, 2]", INTEGERS)
    count, height, width, columns = frames.shape
    check_shape("sizes", sizes, (count, 2), "[T, 2]")
    if sizes.device.type != "cpu":
        raise ValueError(f"sizes must be on the CPU, got {sizes.device}")
    new_height, new_width = sizes.to(torch.int64).unbind(1)
    for name, new, old in (("rows", new_height, height), ("columns", new_width, width)):
        if new.numel() and not (int(new.min()) >= 0 and int(new.max()) <= old):
            raise ValueError(f"sizes must have {name} in [0, {old}], got {new.tolist()}")
    new_width = torch.where(new_height > 0, new_width, 0)
    tokens, _, merged = merge_tokens(frames.flatten(0, 1), new_width.repeat_interleave(height), compat=compat)
    # Each frame is [h, new width] now, and its columns are to be merged: [new width, h].
    turn = _transposition(torch.full_like(new_width, height), new_width).to(frames.device)
    tokens, merged = gather_tokens(tokens, turn, merged)
    tokens, _, merged = merge_tokens(
        tokens.view(-1, height, columns),
        new_height.repeat_interleave(new_width),
        sizes=None if compat else merged.view(-1, height),
        compat=compat,
    )
    tokens, merged = gather_tokens(tokens, _transposition(new_width, new_height).to(frames.device), merged)
    cu_seqlens = torch.nn.functional.pad((new_height * new_width).cumsum(0), (1, 0))
    return tokens, cu_seqlens.to(torch.int32).to(frames.device), merged


def _transposition(rows: Tensor, columns: Tensor) -> Tensor:
    """Where the entries of packed matrices [rows[t], columns[t]] lie, in the order of their transposes."""
    counts = rows * columns
    start = (counts.cumsum(0) - counts).repeat_interleave(counts)
    i = torch.arange(int(counts.sum())) - start
    rows, columns = rows.repeat_interleave(counts), columns.repeat_interleave(counts)
    return start + i % rows * columns + i // rows
