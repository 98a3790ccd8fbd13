"""Dispatch and autograd of resize_frames. It is linear, so its backward's backward is itself."""

import torch

from qts_kernels import backends
from qts_kernels._schemas import MAX_SIDE
from qts_kernels.ops.resize_frames import reference


def _triton(name):
    def load():
        from qts_kernels.ops.resize_frames import triton

        return getattr(triton, name)

    return load


for _op in ("resize_frames", "resize_frames_backward"):
    backends.register(_op, getattr(reference, _op), native=("cpu",), triton=_triton(_op))


@torch.library.impl("qts_kernels::resize_frames", ("cpu", "cuda"))
def _resize_frames(frames, sizes, cu_seqlens, rows, mode):
    if sizes.device.type == "cpu" and sizes.numel():
        _check_sizes(sizes, rows)
    return backends.implementation("resize_frames", frames)(frames, sizes, cu_seqlens, rows, mode)


def _check_sizes(sizes, rows):
    low, high = (int(v) for v in torch.aminmax(sizes))
    if low < 0 or high > MAX_SIDE:
        raise ValueError(f"sizes must be in [0, {MAX_SIDE}], got {low if low < 0 else high}")
    tokens = int(sizes.prod(1).sum())
    if tokens > rows:
        raise ValueError(f"max_tokens must hold the {tokens} tokens of sizes, got {rows}")


@torch.library.impl("qts_kernels::resize_frames_backward", ("cpu", "cuda"))
def _resize_frames_backward(grad, sizes, cu_seqlens, height, width, mode):
    run = backends.implementation("resize_frames_backward", grad)
    return run(grad, sizes, cu_seqlens, height, width, mode)


def _setup_forward(ctx, inputs, output):
    frames, sizes, cu_seqlens, _, ctx.mode = inputs
    ctx.save_for_backward(sizes, cu_seqlens)
    ctx.grid = frames.shape[1:3]


def _backward(ctx, grad):
    grad_frames = torch.ops.qts_kernels.resize_frames_backward(grad, *ctx.saved_tensors, *ctx.grid, ctx.mode)
    return grad_frames, None, None, None, None


def _setup_backward(ctx, inputs, output):
    grad, sizes, cu_seqlens, _, _, ctx.mode = inputs
    ctx.save_for_backward(sizes, cu_seqlens)
    ctx.rows = grad.shape[0]


def _backward_of_backward(ctx, grad):
    return torch.ops.qts_kernels.resize_frames(grad, *ctx.saved_tensors, ctx.rows, ctx.mode), *(None,) * 5


torch.library.register_autograd("qts_kernels::resize_frames", _backward, setup_context=_setup_forward)
torch.library.register_autograd(
    "qts_kernels::resize_frames_backward", _backward_of_backward, setup_context=_setup_backward
)
