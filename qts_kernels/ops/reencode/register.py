"""Dispatch and autograd of the re-encoder's pieces."""

import torch

from qts_kernels import backends
from qts_kernels._checks import check_index_values
from qts_kernels.ops.gather_tokens.register import scatter_add_rows
from qts_kernels.ops.reencode import reference

for _op in ("gather_add_rms_norm", "add_rms_norm", "rms_norm_backward", "bias_gelu", "bias_gelu_backward"):
    backends.register(_op, getattr(reference, _op), native=("cpu", "cuda"))


@torch.library.impl("qts_kernels::gather_add_rms_norm", ("cpu", "cuda"))
def _gather_add_rms_norm(tokens, indices, addend, weight, eps):
    check_index_values("indices", indices, tokens.shape[0])
    return backends.implementation("gather_add_rms_norm", tokens)(tokens, indices, addend, weight, eps)


@torch.library.impl("qts_kernels::add_rms_norm", ("cpu", "cuda"))
def _add_rms_norm(x, residual, weight, eps):
    return backends.implementation("add_rms_norm", x)(x, residual, weight, eps)


@torch.library.impl("qts_kernels::rms_norm_backward", ("cpu", "cuda"))
def _rms_norm_backward(grad_normed, grad_sum, x, weight, rstd):
    return backends.implementation("rms_norm_backward", x)(grad_normed, grad_sum, x, weight, rstd)


@torch.library.impl("qts_kernels::bias_gelu", ("cpu", "cuda"))
def _bias_gelu(x, bias):
    return backends.implementation("bias_gelu", x)(x, bias)


@torch.library.impl("qts_kernels::bias_gelu_backward", ("cpu", "cuda"))
def _bias_gelu_backward(grad, x, bias):
    return backends.implementation("bias_gelu_backward", x)(grad, x, bias)


def _norm_gradients(ctx, grad_total, grad_normed):
    """grad of the normalised sum, and of the weight; either incoming gradient may be None."""
    total, weight, rstd = ctx.saved_tensors[:3]
    if grad_normed is None:
        return grad_total, None
    grad, grad_weight = torch.ops.qts_kernels.rms_norm_backward(
        grad_normed.contiguous(), grad_total, total, weight, rstd
    )
    return grad, None if weight is None else grad_weight.to(weight.dtype)


def _setup_gather(ctx, inputs, output):
    tokens, indices, addend, weight, _ = inputs
    residual, _, rstd = output
    ctx.save_for_backward(residual, weight, rstd, indices)
    ctx.rows, ctx.has_addend = tokens.shape[0], addend is not None
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _gather_backward(ctx, grad_residual, grad_normed, _):
    if grad_residual is None and grad_normed is None:
        return (None,) * 5
    indices = ctx.saved_tensors[3]
    grad, grad_weight = _norm_gradients(ctx, grad_residual, grad_normed)
    grad_addend = grad.masked_fill((indices < 0)[:, None], 0) if ctx.has_addend else None
    return scatter_add_rows(grad, indices, ctx.rows), None, grad_addend, grad_weight, None


def _setup_add(ctx, inputs, output):
    total, _, rstd = output
    ctx.save_for_backward(total, inputs[2], rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _add_backward(ctx, grad_total, grad_normed, _):
    if grad_total is None and grad_normed is None:
        return (None,) * 4
    grad, grad_weight = _norm_gradients(ctx, grad_total, grad_normed)
    return grad, grad, grad_weight, None


def _setup_gelu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx, grad):
    x, bias = ctx.saved_tensors
    grad_x, grad_bias = torch.ops.qts_kernels.bias_gelu_backward(grad.contiguous(), x, bias)
    return grad_x, grad_bias.to(bias.dtype)


torch.library.register_autograd("qts_kernels::gather_add_rms_norm", _gather_backward, setup_context=_setup_gather)
torch.library.register_autograd("qts_kernels::add_rms_norm", _add_backward, setup_context=_setup_add)
torch.library.register_autograd("qts_kernels::bias_gelu", _gelu_backward, setup_context=_setup_gelu)
