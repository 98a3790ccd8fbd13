"""Rows of several tensors in one launch, moved as words: the dtype plays no part."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops._triton_common import on_device_of

# Words of 8 bytes a program: 16 KiB of each tensor in flight with 4 warps.
TILE = 2048
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@triton.jit(do_not_specialize=["count", "rows"])
def _gather_rows(
    sources, targets, widths, strides, indices, count, rows, column_tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    # Programs that share rows are neighbours; the first of them also moves the narrow tensors.
    program = tl.program_id(0)
    slot = (program // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = (program % column_tiles) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    row = tl.load(indices + slot, mask=slot < count, other=-1)
    found = (row >= 0) & (row < rows)
    for i in tl.static_range(len(sources)):
        if first < widths[i]:
            inside = (column < widths[i])[None, :]
            words = tl.load(
                sources[i] + row[:, None] * strides[i] + column[None, :], mask=found[:, None] & inside, other=0
            )
            target = targets[i] + slot[:, None] * widths[i] + column[None, :]
            tl.store(target, words, mask=(slot < count)[:, None] & inside)


def gather_rows(tensors: list[Tensor], indices: Tensor) -> list[Tensor]:
    """See ``qts_kernels.gather_tokens``. An index outside of the tensors' rows gives zeros, like -1."""
    count = indices.shape[0]
    out = [x.new_empty(count, *x.shape[1:]) for x in tensors]
    moved = [(_words(x), y) for x, y in zip(tensors, out, strict=True) if y.numel()]
    if not moved:
        return out
    sources = tuple(source for source, _ in moved)
    targets = tuple(y.view(count, -1).view(source.dtype) for source, y in moved)
    widths = tuple(source.shape[1] for source in sources)
    columns = min(triton.next_power_of_2(max(widths)), TILE)
    rows = max(1, min(32, TILE // columns))
    column_tiles = triton.cdiv(max(widths), columns)
    with on_device_of(indices):
        _gather_rows[(triton.cdiv(count, rows) * column_tiles,)](
            sources,
            targets,
            widths,
            tuple(source.stride(0) for source in sources),
            indices.contiguous(),
            count,
            sources[0].shape[0],
            column_tiles,
            ROWS=rows,
            COLUMNS=columns,
            num_warps=4,
        )
    return out


def _words(x: Tensor) -> Tensor:
    """[T, ...] as [T, words] of the widest integer that its rows, its strides and its address are multiples of."""
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    if flat.stride(1) != 1 and flat.shape[1] > 1:
        flat = flat.contiguous()
    size = flat.element_size()
    bytes_of = (flat.shape[1] * size, flat.stride(0) * size, flat.data_ptr())
    word = next(w for w in WORDS if all(b % w == 0 for b in bytes_of))
    if word < size:
        raise ValueError(f"rows of {x.dtype} must be aligned to their element size, got address {flat.data_ptr()}")
    return flat.view(WORDS[word])
