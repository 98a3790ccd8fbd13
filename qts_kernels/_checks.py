"""Checks of shapes, dtypes, devices and values, with one error style: what was expected and what came.

Shape, dtype and device checks read no data: they run in the public functions and under torch.compile. Value checks
(`check_*_values`) read data, so they run inside the operators and only on CPU tensors; reading a GPU tensor would
synchronise, and there the kernels clamp instead, so that no value can make them leave their memory.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str, x: Tensor, ndim: int | Sequence[int], layout: str, dtypes: Sequence[torch.dtype] = FLOATING
) -> None:
    """Raise TypeError unless ``x`` is a tensor of one of ``dtypes``; ValueError unless its rank is ``ndim``.
    ``layout`` names its axes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(x).__name__}")
    ranks = (ndim,) if isinstance(ndim, int) else tuple(ndim)
    if x.ndim not in ranks:
        raise ValueError(f"{name} must have shape {layout}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {expected}, got {str(x.dtype).removeprefix('torch.')}")


def check_shape(name: str, x: Tensor, shape: Sequence[int], layout: str) -> None:
    """Raise ValueError unless ``x`` has exactly ``shape``."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {layout} = {list(shape)}, got {list(x.shape)}")


def check_same(name: str, x: Tensor, like_name: str, like: Tensor, *, dtype: bool = True) -> None:
    """Raise unless ``x`` is on the device of ``like`` (ValueError) and, where ``dtype``, has its dtype (TypeError)."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {x.device}")
    if dtype and x.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {like_name}, {like.dtype}, got {x.dtype}")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless ``cu_seqlens`` is int32 [S+1], S >= 1, on the device of ``like``."""
    check_tensor(name, cu_seqlens, 1, "[S+1]", (torch.int32,))
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name} must have shape [S+1] with S >= 1, got {list(cu_seqlens.shape)}")
    check_same(name, cu_seqlens, like_name, like, dtype=False)


def check_same_segments(name: str, cu_seqlens: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both cu_seqlens have the same number of segments."""
    if cu_seqlens.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have the same number of segments, "
            f"got {cu_seqlens.shape[0] - 1} and {other.shape[0] - 1}"
        )


def check_cu_seqlens_values(name: str, cu_seqlens: Tensor, total: int) -> None:
    """On the CPU, raise ValueError unless ``cu_seqlens`` starts at 0, never decreases and ends at ``total``."""
    if cu_seqlens.device.type != "cpu":
        return
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            raise ValueError(f"{name} must not decrease, got {values[i - 1]} before {values[i]} at entry {i}")
    if values[-1] != total:
        raise ValueError(f"{name} must end at the number of packed rows, {total}, got {values[-1]}")


def check_not_negative_values(name: str, x: Tensor) -> None:
    """On the CPU, raise ValueError where an entry of ``x`` is negative."""
    if x.device.type != "cpu" or not x.numel():
        return
    low, _ = _range(x)
    if low < 0:
        raise ValueError(f"{name} must not be negative, got {low}")


def check_index_values(name: str, indices: Tensor, rows: int) -> None:
    """On the CPU, raise ValueError unless every index is -1 or in [0, rows)."""
    if indices.device.type != "cpu" or not indices.numel():
        return
    low, high = _range(indices)
    if low < -1 or high >= rows:
        raise ValueError(f"{name} must be -1 or in [0, {rows}), got {low if low < -1 else high}")


def check_open_unit_values(name: str, x: Tensor) -> None:
    """On the CPU, raise ValueError unless every entry of ``x`` is in (0, 1)."""
    if x.device.type != "cpu" or not x.numel():
        return
    low, high = _range(x)
    if not (low > 0 and high < 1):
        raise ValueError(f"{name} must be in (0, 1), got {high if low > 0 else low}")


def check_weight_values(name: str, x: Tensor) -> None:
    """On the CPU, raise ValueError unless every entry of ``x`` is finite and not negative."""
    if x.device.type != "cpu" or not x.numel():
        return
    low, high = _range(x)
    if not (low >= 0 and high < math.inf):
        raise ValueError(f"{name} must be finite and not negative, got {high if low >= 0 else low}")


def _range(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest entry; NaN for both where one is NaN."""
    if x.numel() <= 32 and not x.is_floating_point():  # where a reduction costs more than Python does
        values = x.flatten().tolist()
        return min(values), max(values)
    low, high = torch.aminmax(x)
    return low.item(), high.item()
