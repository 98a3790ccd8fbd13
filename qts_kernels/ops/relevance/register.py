"""Dispatch and autograd of relevance."""

import torch

from qts_kernels import backends
from qts_kernels._checks import check_cu_seqlens_values
from qts_kernels.ops.relevance import reference


def _triton(name: str):
    from qts_kernels.ops.relevance import triton

    return getattr(triton, name)


backends.register("relevance", reference.relevance, native=("cpu",), triton=lambda: _triton("relevance"))
backends.register("relevance_backward", reference.relevance_backward, triton=lambda: _triton("relevance_backward"))


@torch.library.impl("qts_kernels::relevance", ("cpu", "cuda"))
def _relevance(query, key, key_scale, cu_seqlens_q, cu_seqlens_k, column_start, cu_columns, total_columns, *rest):
    check_cu_seqlens_values("cu_seqlens_q", cu_seqlens_q, query.shape[0])
    check_cu_seqlens_values("cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if cu_columns is not None:
        check_cu_seqlens_values("cu_columns", cu_columns, total_columns)
    run = backends.implementation("relevance", query)
    return run(query, key, key_scale, cu_seqlens_q, cu_seqlens_k, column_start, cu_columns, total_columns, *rest)


@torch.library.impl("qts_kernels::relevance_backward", ("cpu", "cuda"))
def _relevance_backward(grad, query, *rest):
    return backends.implementation("relevance_backward", query)(grad, query, *rest)


def _setup_context(ctx, inputs, output):
    query, key, key_scale, cu_q, cu_k, column_start, cu_columns, _, reduce, scale, causal, with_argrow = inputs
    scores, lse, argrow = output
    ctx.save_for_backward(query, key, key_scale, cu_q, cu_k, column_start, cu_columns, scores, lse, argrow)
    ctx.options = (reduce, scale, causal)
    ctx.with_argrow = with_argrow
    ctx.mark_non_differentiable(lse, argrow)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_scores, grad_lse, grad_argrow):
    if grad_scores is None:
        return (None,) * 12
    query, key, key_scale, *rest = ctx.saved_tensors
    if ctx.options[0] == "max" and not ctx.with_argrow:
        raise RuntimeError(
            'relevance with reduce="max" needs with_argrow=True for its gradient; '
            "call qts_kernels.relevance, which sets it"
        )
    grad_query, grad_key, grad_scale = torch.ops.qts_kernels.relevance_backward(
        grad_scores.contiguous(), query, key, key_scale, *rest, *ctx.options
    )
    return (grad_query, grad_key, None if key_scale is None else grad_scale, *(None,) * 9)


torch.library.register_autograd("qts_kernels::relevance", _backward, setup_context=_setup_context)
