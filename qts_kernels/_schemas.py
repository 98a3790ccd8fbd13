"""Every operator's schema and fake: the table of contents of the ops.

Two namespaces. ``qts_kernels::*`` are the ops that autograd and torch.compile see; ``ops/<op>/register.py``
implements them by asking ``backends`` for an implementation. ``qts_kernels_native::*`` has the same signatures and is
what the compiled extensions implement. Python owns every schema; C++ owns none.

S segments, T tokens, H heads, Hkv key heads, Dh head size, D model size. cu_seqlens are int32 [S+1]; indices are int64.
"""

import torch
from torch import Tensor

SCHEMAS = {
    # query [Tq, H, Dh], key [Tk, Hkv, Dh], key_scale fp32 [Tk] -> scores fp32 [total_columns], lse fp32 [H, Tq],
    # argrow int64 [total_columns], h * Tq + query row that attains the maximum (empty unless with_argrow and "max").
    # column_start int32 [S] and cu_columns int32 [S+1] give the wanted columns of each segment; both None: every key.
    "relevance": "(Tensor query, Tensor key, Tensor? key_scale, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? column_start, Tensor? cu_columns, SymInt total_columns, str reduce, float scale, bool causal, "
    "bool with_argrow) -> (Tensor, Tensor, Tensor)",
    # grad fp32 [total_columns] -> grad_query, grad_key like query and key, grad_key_scale fp32 [Tk] (empty without
    # key_scale).
    "relevance_backward": "(Tensor grad, Tensor query, Tensor key, Tensor? key_scale, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, Tensor? column_start, Tensor? cu_columns, Tensor scores, Tensor lse, Tensor argrow, "
    "str reduce, float scale, bool causal) -> (Tensor, Tensor, Tensor)",
    # x [..., D] -> 1/rms fp32 [...]
    "rms_scale": "(Tensor x, float eps) -> Tensor",
    # scores fp32 [T], n int64 [S] -> indices int64 [min(S * max_n, T)], cu_seqlens_out int32 [S+1]
    "topn": "(Tensor scores, Tensor cu_seqlens, Tensor n, SymInt max_n) -> (Tensor, Tensor)",
    # each tensor [T, ...], indices int64 [N] -> each [N, ...]; zeros where the index is -1
    "gather_rows": "(Tensor[] tensors, Tensor indices) -> Tensor[]",
    # scores fp32 [T], rho fp32 [S] -> t fp32 [S]
    "soft_threshold": "(Tensor scores, Tensor rho, Tensor cu_seqlens, float tau) -> Tensor",
    # tokens [T, D], indices int64 [N], addend [N, D], weight [D] -> residual [N, D], normed [N, D], rstd fp32 [N]
    "gather_add_rms_norm": "(Tensor tokens, Tensor indices, Tensor? addend, Tensor? weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    # x [N, D], residual [N, D], weight [D] -> sum [N, D], normed [N, D], rstd fp32 [N]
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    # grad_normed [N, D], grad_sum [N, D], x [N, D] (the normalised tensor), weight [D], rstd fp32 [N]
    # -> grad_x [N, D] (grad_sum included), grad_weight fp32 [D] (empty without weight)
    "rms_norm_backward": "(Tensor grad_normed, Tensor? grad_sum, Tensor x, Tensor? weight, Tensor rstd) "
    "-> (Tensor, Tensor)",
    # x [N, F], bias [F] -> gelu_erf(x + bias) [N, F]
    "bias_gelu": "(Tensor x, Tensor bias) -> Tensor",
    # -> grad_x [N, F], grad_bias fp32 [F]
    "bias_gelu_backward": "(Tensor grad, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    # weights fp64 [T], total int64 [S], cap int64 [T] -> counts int64 [T]
    "allocate_tokens": "(Tensor weights, Tensor cu_seqlens, Tensor total, Tensor? cap) -> Tensor",
    # frames [T, h, w, D], sizes int64 [T, 2] -> tokens [rows, D]
    "resize_frames": "(Tensor frames, Tensor sizes, Tensor cu_seqlens, SymInt rows, str mode) -> Tensor",
    # grad [rows, D] -> grad_frames [T, height, width, D]
    "resize_frames_backward": "(Tensor grad, Tensor sizes, Tensor cu_seqlens, SymInt height, SymInt width, "
    "str mode) -> Tensor",
    # frames [T, N, D], counts int64 [T], sizes fp32 [T, N] -> tokens [total, D], sizes fp32 [total]; and of each token
    # of a frame its row there, int64 [T, N] (-1: none), and its weight in the mean, fp32 [T, N]
    "merge_tokens": "(Tensor frames, Tensor counts, Tensor cu_seqlens, Tensor? sizes, SymInt total, bool compat) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"qts_kernels::{_name}", _schema)
    torch.library.define(f"qts_kernels_native::{_name}", _schema)

# Rows and columns of a grid, old or new, so that positions along an axis fit 32-bit integers.
MAX_SIDE = 2**15 - 1


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Scores and statistics are fp32 whatever the input; float64 stays float64, so that gradcheck can be run."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("qts_kernels::relevance")
def _(
    query,
    key,
    key_scale,
    cu_seqlens_q,
    cu_seqlens_k,
    column_start,
    cu_columns,
    total_columns,
    reduce,
    scale,
    causal,
    with_argrow,
):
    dtype = statistics_dtype(query)
    return (
        query.new_empty(total_columns, dtype=dtype),
        query.new_empty(query.shape[1], query.shape[0], dtype=dtype),
        query.new_empty(total_columns if with_argrow and reduce == "max" else 0, dtype=torch.int64),
    )


@torch.library.register_fake("qts_kernels::relevance_backward")
def _(
    grad,
    query,
    key,
    key_scale,
    cu_seqlens_q,
    cu_seqlens_k,
    column_start,
    cu_columns,
    scores,
    lse,
    argrow,
    reduce,
    scale,
    causal,
):
    grad_key_scale = (
        query.new_empty(0, dtype=statistics_dtype(query)) if key_scale is None else torch.empty_like(key_scale)
    )
    return (
        torch.empty_like(query, memory_format=torch.contiguous_format),
        torch.empty_like(key, memory_format=torch.contiguous_format),
        grad_key_scale,
    )


@torch.library.register_fake("qts_kernels::rms_scale")
def _(x, eps):
    return x.new_empty(x.shape[:-1], dtype=statistics_dtype(x))


@torch.library.register_fake("qts_kernels::topn")
def _(scores, cu_seqlens, n, max_n):
    rows = torch.sym_min((cu_seqlens.shape[0] - 1) * max_n, scores.shape[0])
    return scores.new_empty(rows, dtype=torch.int64), torch.empty_like(cu_seqlens)


@torch.library.register_fake("qts_kernels::gather_rows")
def _(tensors, indices):
    return [t.new_empty(indices.shape[0], *t.shape[1:]) for t in tensors]


@torch.library.register_fake("qts_kernels::soft_threshold")
def _(scores, rho, cu_seqlens, tau):
    return torch.empty_like(rho)


@torch.library.register_fake("qts_kernels::gather_add_rms_norm")
def _(tokens, indices, addend, weight, eps):
    shape = (indices.shape[0], tokens.shape[1])
    return (
        tokens.new_empty(shape),
        tokens.new_empty(shape),
        tokens.new_empty(shape[0], dtype=statistics_dtype(tokens)),
    )


@torch.library.register_fake("qts_kernels::add_rms_norm")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=statistics_dtype(x))


@torch.library.register_fake("qts_kernels::rms_norm_backward")
def _(grad_normed, grad_sum, x, weight, rstd):
    return x.new_empty(x.shape), x.new_empty(0 if weight is None else x.shape[1], dtype=statistics_dtype(x))


@torch.library.register_fake("qts_kernels::bias_gelu")
def _(x, bias):
    return x.new_empty(x.shape)


@torch.library.register_fake("qts_kernels::bias_gelu_backward")
def _(grad, x, bias):
    return x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=statistics_dtype(x))


@torch.library.register_fake("qts_kernels::allocate_tokens")
def _(weights, cu_seqlens, total, cap):
    return weights.new_empty(weights.shape, dtype=torch.int64)


@torch.library.register_fake("qts_kernels::resize_frames")
def _(frames, sizes, cu_seqlens, rows, mode):
    return frames.new_empty(rows, frames.shape[3])


@torch.library.register_fake("qts_kernels::resize_frames_backward")
def _(grad, sizes, cu_seqlens, height, width, mode):
    return grad.new_empty(sizes.shape[0], height, width, grad.shape[1])


@torch.library.register_fake("qts_kernels::merge_tokens")
def _(frames, counts, cu_seqlens, sizes, total, compat):
    dtype = statistics_dtype(frames)
    return (
        frames.new_empty(total, frames.shape[2]),
        frames.new_empty(total, dtype=dtype),
        frames.new_empty(frames.shape[:2], dtype=torch.int64),
        frames.new_empty(frames.shape[:2], dtype=dtype),
    )
