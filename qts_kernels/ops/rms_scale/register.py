"""Dispatch and autograd of rms_scale."""

import torch

from qts_kernels import backends
from qts_kernels.ops.rms_scale import reference


def _triton():
    from qts_kernels.ops.rms_scale import triton

    return triton.rms_scale


backends.register("rms_scale", reference.rms_scale, native=("cpu",), triton=_triton)


@torch.library.impl("qts_kernels::rms_scale", ("cpu", "cuda"))
def _rms_scale(x, eps):
    return backends.implementation("rms_scale", x)(x, eps)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx, grad):
    x, scale = ctx.saved_tensors
    # d (mean x^2 + eps)^(-1/2) / dx = -scale^3 x / D
    return (-(grad * scale**3 / x.shape[-1])[..., None] * x).to(x.dtype), None


torch.library.register_autograd("qts_kernels::rms_scale", _backward, setup_context=_setup_context)
