"""Every frame to a grid of its own."""

import torch
from torch import Tensor

import qts_kernels.ops.resize_frames.register  # noqa: F401
from qts_kernels._checks import check_same, check_shape, check_tensor
from qts_kernels._schemas import MAX_SIDE

MODES = ("bilinear", "adaptive_avg", "linspace")


def resize_frames(
    frames: Tensor, sizes: Tensor, mode: str = "bilinear", *, max_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Resample the token grid of each frame to a size of its own, all frames in one launch.

    - "bilinear": ``F.interpolate(mode="bilinear", align_corners=False)`` of the grid.
    - "adaptive_avg": ``F.adaptive_avg_pool2d`` of the grid.
    - "linspace": of the h * w tokens in raster order those that ``torch.linspace(0, h * w - 1, n)`` in float32, cut to
      integers, names; n is the product of the frame's size. Tokens are copied, not mixed.

    Args:
        frames: [T, h, w, D], h and w in [1, 32767]. float32, bfloat16 or float16, added up in float32 (float64 for
            checking).
        sizes: [T, 2] int64 or int32: rows and columns of each frame's new grid, in tokens. A frame with a size of 0
            has no tokens. On the CPU or on the device of ``frames``. A size outside of [0, 32767] raises on the CPU;
            on a GPU it is clamped.
        mode: "bilinear", "adaptive_avg" or "linspace".
        max_tokens: the number of rows of the result, which must hold all tokens. On the CPU one that is too small
            raises; on a GPU the tokens behind it are left out. Give it where ``sizes`` is on a GPU, so that nothing
            synchronises, and under torch.compile. Default: as many rows as there are tokens.

    Returns:
        tokens: [sum, D] (or [max_tokens, D], zeros behind ``cu_seqlens[-1]``), frame after frame, each in raster order.
            Differentiable in ``frames``, twice; the same bits on every run.
        cu_seqlens: int32 [T+1].

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices, sizes, mode or max_tokens that do not fit.
    """
    check_tensor("frames", frames, 4, "[T, h, w, D]")
    check_tensor("sizes", sizes, 2, "[T, 2]", (torch.int64, torch.int32))
    check_shape("sizes", sizes, (frames.shape[0], 2), "[T, 2]")
    if sizes.device.type != "cpu":
        check_same("sizes", sizes, "frames", frames, dtype=False)
    if not (1 <= frames.shape[1] <= MAX_SIDE and 1 <= frames.shape[2] <= MAX_SIDE):
        raise ValueError(f"frames must have h and w in [1, {MAX_SIDE}], got shape {list(frames.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {list(MODES)}, got {mode!r}")
    if max_tokens is not None and max_tokens < 0:
        raise ValueError(f"max_tokens must not be negative, got {max_tokens}")
    counts = sizes.to(torch.int64).clamp(0, MAX_SIDE).prod(1)
    if max_tokens is None:
        max_tokens = int(counts.sum())
    # Cut before the sum, so that no size makes it overflow.
    cu_seqlens = torch.nn.functional.pad(counts.clamp(max=max_tokens).cumsum(0), (1, 0)).clamp(max=max_tokens)
    cu_seqlens = cu_seqlens.to(torch.int32).to(frames.device, non_blocking=True)
    sizes = sizes.to(torch.int64).to(frames.device, non_blocking=True)
    return torch.ops.qts_kernels.resize_frames(frames, sizes, cu_seqlens, max_tokens, mode), cu_seqlens
