"""Dispatch and autograd of merge_tokens. The matching is constant: each token is a fixed mean of the frame's."""

import torch

from qts_kernels import backends
from qts_kernels.ops.merge_tokens import reference


def _triton():
    from qts_kernels.ops.merge_tokens import triton

    return triton.merge_tokens


backends.register("merge_tokens", reference.merge_tokens, native=("cpu",), triton=_triton)


@torch.library.impl("qts_kernels::merge_tokens", ("cpu", "cuda"))
def _merge_tokens(frames, counts, cu_seqlens, sizes, total, compat):
    if counts.device.type == "cpu" and counts.numel():
        low, high = (int(v) for v in torch.aminmax(counts))
        if low < 0 or high > frames.shape[1]:
            raise ValueError(f"counts must be in [0, {frames.shape[1]}], got {low if low < 0 else high}")
        if int(counts.sum()) > total:
            raise ValueError(f"max_tokens must hold the {int(counts.sum())} tokens of counts, got {total}")
    if sizes is not None and sizes.device.type == "cpu" and not (sizes.isfinite() & (sizes > 0)).all():
        bad = sizes[~(sizes.isfinite() & (sizes > 0))][0].item()
        raise ValueError(f"sizes must be finite and above 0, got {bad}")
    counts = counts.clamp(0, frames.shape[1])
    run = backends.implementation("merge_tokens", frames)
    return run(frames, counts, cu_seqlens, sizes, total, compat)


def _setup_context(ctx, inputs, output):
    _, _, rows, shares = output
    ctx.save_for_backward(rows, shares)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    rows, shares = ctx.saved_tensors
    grad_frames = torch.ops.qts_kernels.gather_rows([grad], rows.flatten())[0].view(*rows.shape, grad.shape[1])
    return (grad_frames * shares[..., None]).to(grad.dtype), None, None, None, None, None


torch.library.register_autograd("qts_kernels::merge_tokens", _backward, setup_context=_setup_context)
