"""1/rms of each row in one read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops._triton_common import check_dtype, on_device_of

# One program reads about this many elements at a time: 8 to 16 KiB in flight with 4 warps.
TILE = 4096


@triton.jit(do_not_specialize=["rows"])
def _rms_scale(
    x,
    out,
    rows,
    width,
    row_stride,
    inverse_width,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    base = x + row[:, None] * row_stride
    inside = (row < rows)[:, None]
    if ONE_TILE:
        value = tl.load(base + column[None, :], mask=inside & (column < width)[None, :], other=0).to(tl.float32)
        total = tl.sum(value * value, 1)
    else:
        squares = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, width, COLUMNS):
            here = start + column
            value = tl.load(base + here[None, :], mask=inside & (here < width)[None, :], other=0).to(tl.float32)
            squares += value * value
        total = tl.sum(squares, 1)
    tl.store(out + row, tl.rsqrt(total * inverse_width + eps), mask=row < rows)


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """See ``qts_kernels.rms_scale``."""
    check_dtype("x", x)
    width = x.shape[-1]
    flat = x.reshape(-1, width)
    if flat.stride(1) != 1 and width > 1:
        flat = flat.contiguous()
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rows = flat.shape[0]
    if rows == 0:
        return out
    columns = min(triton.next_power_of_2(width), TILE)
    tile_rows = max(1, min(64, TILE // columns))
    with on_device_of(x):
        _rms_scale[(triton.cdiv(rows, tile_rows),)](
            flat,
            out,
            rows,
            width,
            flat.stride(0),
            1.0 / width,
            eps,
            ROWS=tile_rows,
            COLUMNS=columns,
            ONE_TILE=columns >= width,
            num_warps=4,
        )
    return out
