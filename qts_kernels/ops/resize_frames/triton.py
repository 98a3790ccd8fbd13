"""Every frame to a grid of its own: one program a row of the result (in the backward, of a frame) and block of columns.

Sizes lie on the device and are not checked there: clamped to MAX_SIDE, all positions along an axis fit 32-bit integers.
"""

import triton
import triton.language as tl
from torch import Tensor

from qts_kernels._schemas import MAX_SIDE
from qts_kernels.ops._triton_common import check_dtype, on_device_of, segment_of_rows

MAX_BLOCK = 1024
_MAX_SIDE = tl.constexpr(MAX_SIDE)


@triton.jit
def _size(sizes, frame):
    """Rows and columns of a frame's new grid."""
    height = tl.minimum(tl.maximum(tl.load(sizes + 2 * frame), 1), _MAX_SIDE).to(tl.int32)
    width = tl.minimum(tl.maximum(tl.load(sizes + 2 * frame + 1), 1), _MAX_SIDE).to(tl.int32)
    return height, width


@triton.jit
def _bilinear(i, length, new_length):
    """Element i of the new axis lies ``weight`` of the way from element ``low`` of the old to ``low + step``; step is 0
    where the weight is, so that nothing is read that has none."""
    position = tl.maximum((2 * i + 1) * length - new_length, 0)
    low = position // (2 * new_length)
    rest = position % (2 * new_length)
    step = ((rest > 0) & (low + 1 < length)).to(tl.int32)
    return low, step, step.to(tl.float32) * (rest.to(tl.float32) / (2 * new_length).to(tl.float32))


@triton.jit
def _linspace(i, length, new_length):
    """torch.linspace(0, length - 1, new_length)[i] in float32, cut to an integer.

    Products of float32 are taken in float64, where they are exact, so that no compiler can keep them unrounded.
    """
    end = (length - 1).to(tl.float64)
    step = (end / tl.maximum(new_length - 1, 1).to(tl.float64)).to(tl.float32).to(tl.float64)
    first_half = (i < new_length // 2) | (new_length == 1)
    offset = (step * tl.where(first_half, i, new_length - 1 - i).to(tl.float64)).to(tl.float32)
    return tl.where(first_half, offset, (end - offset.to(tl.float64)).to(tl.float32)).to(tl.int32)


@triton.jit
def _axis_weight(i, k, length, new_length, MODE: tl.constexpr):
    """What element k of the old axis weighs in element i of the new one."""
    if MODE == "bilinear":
        low, step, weight = _bilinear(i, length, new_length)
        return tl.where(k == low, 1.0 - weight, tl.where(k == low + step, weight, 0.0))
    else:
        first = i * length // new_length
        last = tl.cdiv((i + 1) * length, new_length)
        return tl.where((k >= first) & (k < last), 1.0 / (last - first).to(tl.float32), 0.0)


@triton.jit
def _reach(k, length, new_length):
    """A range of the new axis that holds every element in which element k of the old one can weigh anything."""
    first = tl.maximum((k - 1) * new_length // length - 2, 0)
    last = tl.minimum((k + 2) * new_length // length + 3, new_length)
    return tl.where(k == 0, 0, first), tl.where(k == length - 1, new_length, last)


@triton.jit(do_not_specialize=["segments", "rows", "height", "width"])
def _resize(
    frames, sizes, cu_seqlens, tokens, segments, rows, height, width, columns, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    sums = tl.zeros([BLOCK], tl.float32)
    if row < tl.load(cu_seqlens + segments):
        frame = segment_of_rows(cu_seqlens, segments, row)
        new_height, new_width = _size(sizes, frame)
        token = row - tl.load(cu_seqlens + frame)
        source = frames + frame.to(tl.int64) * height * width * columns + column
        if MODE == "linspace":
            index = _linspace(token, height * width, new_height * new_width)
            sums = tl.load(source + index.to(tl.int64) * columns, mask=inside, other=0.0).to(tl.float32)
        elif MODE == "bilinear":
            y, below, down = _bilinear(token // new_width, height, new_height)
            x, beside, right = _bilinear(token % new_width, width, new_width)
            corner = source + (y * width + x).to(tl.int64) * columns
            under = corner + width.to(tl.int64) * columns
            a = tl.load(corner, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(corner + columns, mask=inside & (beside > 0), other=0.0).to(tl.float32)
            c = tl.load(under, mask=inside & (below > 0), other=0.0).to(tl.float32)
            d = tl.load(under + columns, mask=inside & (beside * below > 0), other=0.0).to(tl.float32)
            sums = (1.0 - down) * ((1.0 - right) * a + right * b) + down * ((1.0 - right) * c + right * d)
        else:
            y = token // new_width
            x = token % new_width
            top = y * height // new_height
            bottom = tl.cdiv((y + 1) * height, new_height)
            left = x * width // new_width
            right = tl.cdiv((x + 1) * width, new_width)
            for v in range(top, bottom):
                for h in range(left, right):
                    old = source + (v * width + h).to(tl.int64) * columns
                    sums += tl.load(old, mask=inside, other=0.0).to(tl.float32)
            sums *= 1.0 / ((bottom - top) * (right - left)).to(tl.float32)
    out = tokens + row.to(tl.int64) * columns + column
    tl.store(out, sums.to(tokens.dtype.element_ty), mask=inside & (row < rows))


@triton.jit(do_not_specialize=["height", "width"])
def _resize_backward(
    grad, sizes, cu_seqlens, grad_frames, height, width, columns, MODE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    frame = row // (height * width)
    pixel = row % (height * width)
    start = tl.load(cu_seqlens + frame)
    count = tl.load(cu_seqlens + frame + 1) - start
    sums = tl.zeros([BLOCK], tl.float32)
    if count > 0:
        new_height, new_width = _size(sizes, frame)
        source = grad + start.to(tl.int64) * columns + column
        if MODE == "linspace":
            tokens = new_height * new_width
            first, last = _reach(pixel.to(tl.int64), height * width, tokens)
            at = source + first * columns
            for i in range(first.to(tl.int32), tl.minimum(last, count).to(tl.int32)):
                if _linspace(i, height * width, tokens) == pixel:
                    sums += tl.load(at, mask=inside, other=0.0).to(tl.float32)
                at += columns
        else:
            y = pixel // width
            x = pixel % width
            top, bottom = _reach(y, height, new_height)
            left, right = _reach(x, width, new_width)
            for v in range(top, tl.minimum(bottom, tl.cdiv(count, new_width))):
                vertical = _axis_weight(v, y, height, new_height, MODE)
                if vertical > 0:
                    for h in range(left, right):
                        weight = vertical * _axis_weight(h, x, width, new_width, MODE)
                        i = v * new_width + h
                        if (weight > 0) & (i < count):
                            taken = tl.load(source + i.to(tl.int64) * columns, mask=inside, other=0.0)
                            sums += weight * taken.to(tl.float32)
    tl.store(grad_frames + row.to(tl.int64) * columns + column, sums.to(grad_frames.dtype.element_ty), mask=inside)


def resize_frames(frames: Tensor, sizes: Tensor, cu_seqlens: Tensor, rows: int, mode: str) -> Tensor:
    """See ``qts_kernels.resize_frames``."""
    check_dtype("frames", frames)
    segments, height, width, columns = frames.shape
    tokens = frames.new_empty(rows, columns)
    block = _block(columns)
    if tokens.numel():
        with on_device_of(frames):
            _resize[(rows, triton.cdiv(columns, block))](
                frames.contiguous(), sizes.contiguous(), cu_seqlens.contiguous(), tokens, segments, rows, height, width,
                columns, MODE=mode, BLOCK=block, num_warps=max(1, block // 256),
            )  # fmt: skip
    return tokens


def resize_frames_backward(
    grad: Tensor, sizes: Tensor, cu_seqlens: Tensor, height: int, width: int, mode: str
) -> Tensor:
    """The transpose of ``resize_frames``; each program adds up in one order, so the same bits on every run."""
    check_dtype("grad", grad)
    columns = grad.shape[1]
    grad_frames = grad.new_empty(sizes.shape[0], height, width, columns)
    block = _block(columns)
    if grad_frames.numel():
        with on_device_of(grad):
            _resize_backward[(sizes.shape[0] * height * width, triton.cdiv(columns, block))](
                grad.contiguous(), sizes.contiguous(), cu_seqlens.contiguous(), grad_frames, height, width, columns,
                MODE=mode, BLOCK=block, num_warps=max(1, block // 256),
            )  # fmt: skip
    return grad_frames


def _block(columns: int) -> int:
    return min(MAX_BLOCK, max(32, triton.next_power_of_2(columns)))
