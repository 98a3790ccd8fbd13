"""Frames to grids of their own in eager PyTorch: the specification. Sums are taken in float32 at least."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from qts_kernels._schemas import statistics_dtype


def resize_frames(frames: Tensor, sizes: Tensor, cu_seqlens: Tensor, rows: int, mode: str) -> Tensor:
    """See ``qts_kernels.resize_frames`` for the modes and ``_schemas`` for the shapes."""
    tokens = frames.new_zeros(rows, frames.shape[3])
    for frame, size, (start, stop) in zip(frames, sizes.tolist(), pairwise(cu_seqlens.tolist()), strict=True):
        if start < stop:
            # A frame that reaches behind the last row is cut there.
            tokens[start:stop] = _resize(frame.to(statistics_dtype(frame)), size, mode)[: stop - start]
    return tokens


def resize_frames_backward(
    grad: Tensor, sizes: Tensor, cu_seqlens: Tensor, height: int, width: int, mode: str
) -> Tensor:
    """The transpose of ``resize_frames``: [rows, D] -> [T, height, width, D]."""
    grad_frames = grad.new_zeros(sizes.shape[0], height, width, grad.shape[1])
    for out, size, (start, stop) in zip(grad_frames, sizes.tolist(), pairwise(cu_seqlens.tolist()), strict=True):
        if start < stop:
            whole = grad.new_zeros(size[0] * size[1], grad.shape[1], dtype=statistics_dtype(grad))
            whole[: stop - start] = grad[start:stop]
            out.copy_(_transposed(whole, size, height, width, mode))
    return grad_frames


def _resize(frame: Tensor, size: list[int], mode: str) -> Tensor:
    height, width, columns = frame.shape
    if mode == "linspace":
        return frame.flatten(0, 1)[_linspace(height * width, size).to(frame.device)]
    image = frame.permute(2, 0, 1)[None]
    if mode == "bilinear":
        resized = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    else:
        resized = F.adaptive_avg_pool2d(image, size)
    return resized[0].permute(1, 2, 0).reshape(-1, columns)


def _transposed(grad: Tensor, size: list[int], height: int, width: int, mode: str) -> Tensor:
    columns = grad.shape[1]
    if mode == "linspace":
        out = grad.new_zeros(height * width, columns)
        return out.index_add_(0, _linspace(height * width, size).to(grad.device), grad).view(height, width, columns)
    image = grad.view(*size, columns).permute(2, 0, 1)[None]
    if mode == "bilinear":
        out = torch.ops.aten.upsample_bilinear2d_backward(image, size, [1, columns, height, width], False, None, None)
    else:
        out = torch.ops.aten._adaptive_avg_pool2d_backward(image, image.new_zeros(1, columns, height, width))
    return out[0].permute(1, 2, 0)


def _linspace(tokens: int, size: list[int]) -> Tensor:
    return torch.linspace(0, tokens - 1, size[0] * size[1], dtype=torch.float32).long()
