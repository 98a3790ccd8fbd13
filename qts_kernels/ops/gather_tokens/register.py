"""Dispatch and autograd of gather_tokens."""

import torch

from qts_kernels import backends
from qts_kernels._checks import check_index_values
from qts_kernels.ops.gather_tokens import reference


def _triton():
    from qts_kernels.ops.gather_tokens import triton

    return triton.gather_rows


backends.register("gather_rows", reference.gather_rows, native=("cpu",), triton=_triton)


@torch.library.impl("qts_kernels::gather_rows", ("cpu", "cuda"))
def _gather_rows(tensors, indices):
    check_index_values("indices", indices, tensors[0].shape[0])
    return backends.implementation("gather_rows", indices)(tensors, indices)


def _setup_context(ctx, inputs, output):
    tensors, indices = inputs
    ctx.save_for_backward(indices)
    ctx.shapes = [t.shape for t in tensors]


def _backward(ctx, grads):
    (indices,) = ctx.saved_tensors
    return [
        scatter_add_rows(g, indices, shape[0]) if g is not None else None
        for g, shape in zip(grads, ctx.shapes, strict=True)
    ], None


def scatter_add_rows(grad: torch.Tensor, indices: torch.Tensor, rows: int) -> torch.Tensor:
    """The transpose of a row gather: [N, ...] -> [rows, ...], rows of the same index added up, index -1 left out."""
    out = grad.new_zeros(rows, *grad.shape[1:])
    if rows == 0:
        return out
    grad = grad.masked_fill((indices < 0).view(-1, *(1,) * (grad.ndim - 1)), 0)
    return out.index_add_(0, indices.clamp(min=0), grad)


torch.library.register_autograd("qts_kernels::gather_rows", _backward, setup_context=_setup_context)
