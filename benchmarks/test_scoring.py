"""Scoring raw vision tokens, what QTSplus's scorer does: 1/rms, key projection, relevance. And relevance alone, keys
given."""

import importlib.util

import pytest
import torch
from ceilings import Work
from guard import REFERENCE
from torch.nn import functional as F

import qts_kernels
from qts_kernels import backends
from qts_kernels.testing import assert_within_budget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CPU_SHAPES = [(16384, 2048, 16, 2, 32)]
GPU_SHAPES = [(100_000, 3584, 28, 4, 64)]
SHAPES = GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES
HEAD_DIM = 128


def eager_relevance(query, key, key_scale=None):
    """[1, L, H, Dh], [1, M, Hkv, Dh] -> [1, M], the attention matrix in memory, softmax in fp32: what the release
    computes."""
    key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
    logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    if key_scale is not None:
        logits = logits * key_scale[:, None, None]
    return logits.softmax(-1, dtype=torch.float32).amax((1, 2))


def eager_scorer(x, norm, weight, query, eps=1e-6):
    wide = x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * norm
    key = F.linear(normed, weight).view(1, x.shape[0], -1, HEAD_DIM)
    return eager_relevance(query, key)


def released_layer(x, norm, weight, query, eps=1e-6):
    """The eager scorer with what its last layer computes and nobody reads: V and the attention output."""
    wide = x.float()
    normed = (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * norm
    key, value = (F.linear(normed, weight).view(1, x.shape[0], -1, HEAD_DIM) for _ in range(2))
    group = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(group, dim=2), value.repeat_interleave(group, dim=2)
    logits = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * query.shape[-1] ** -0.5
    weights = logits.softmax(-1, dtype=torch.float32).to(x.dtype)
    return weights.amax((1, 2)), weights @ value.transpose(1, 2)


def our_scorer(x, folded, query, eps=1e-6):
    key = F.linear(x, folded).view(1, x.shape[0], -1, HEAD_DIM)
    return qts_kernels.relevance(query, key, key_scale=qts_kernels.rms_scale(x, eps)[None])


def make(shape, dtype, device):
    m, d, heads, kv_heads, length = shape
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(m, d, **draw).to(dtype)
    norm = (1 + 0.1 * torch.randn(d, **draw)).to(dtype)
    weight = (torch.randn(kv_heads * HEAD_DIM, d, **draw) * d**-0.5).to(dtype)
    query = torch.randn(1, length, heads, HEAD_DIM, **draw).to(dtype)
    return x, norm, weight, query


def name(shape, dtype):
    m, d, heads, kv_heads, length = shape
    return f"{dtype} M={m} D={d} heads={heads}/{kv_heads} L={length}"


def relevance_work(shape, dtype):
    """Two passes over the keys: the denominators, and the best of each key."""
    m, _, heads, kv_heads, length = shape
    passes = 2 * (2 * heads * length * m * HEAD_DIM)
    return Work(bytes=m * (kv_heads * HEAD_DIM * dtype.itemsize + 4), flops=passes, dtype=dtype)


def scorer_work(shape, dtype):
    m, d, _, kv_heads, _ = shape
    projection = Work(bytes=m * d * dtype.itemsize, flops=2 * m * d * kv_heads * HEAD_DIM, dtype=dtype)
    return projection + relevance_work(shape, dtype)


def check(ours, eager, exact):
    assert_within_budget(ours, eager, exact, atol=1e-7)


def referred(run):
    """``run`` with every op served by its eager reference."""

    def call(*inputs):
        with backends.force("reference"):
            return run(*inputs)

    return call


SCORERS = [
    "qts_kernels",
    REFERENCE,
    "eager, as a model writes it",
    "eager, as released",
    "torch.compile",
    "key projection GEMM alone",
]


@pytest.mark.parametrize("who", SCORERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_score_raw_tokens(timed, device, shape, dtype, who):
    x, norm, weight, query = make(shape, DTYPES[dtype], device)
    folded = weight * norm
    compiled = torch.compile(eager_scorer) if who == "torch.compile" else None
    runs = {
        "qts_kernels": lambda: our_scorer(x, folded, query),
        REFERENCE: referred(lambda: our_scorer(x, folded, query)),
        "eager, as a model writes it": lambda: eager_scorer(x, norm, weight, query),
        "eager, as released": lambda: released_layer(x, norm, weight, query),
        "torch.compile": lambda: compiled(x, norm, weight, query),
        "key projection GEMM alone": lambda: F.linear(x, folded),
    }
    if who == "qts_kernels":
        exact = eager_scorer(x.double(), norm.double(), weight.double(), query.double())
        check(runs[who](), runs["eager, as a model writes it"](), exact)
    work = scorer_work(shape, DTYPES[dtype]) if who == "qts_kernels" else None
    timed("score raw tokens", name(shape, dtype), who, runs[who], work=work, graph=who != REFERENCE)


@pytest.mark.parametrize("who", ["qts_kernels", "eager", "torch.compile", "flash-colreduce"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_relevance(timed, device, shape, dtype, who):
    x, _, weight, query = make(shape, DTYPES[dtype], device)
    key = F.linear(x, weight).view(1, shape[0], -1, HEAD_DIM)
    del x
    compiled = torch.compile(eager_relevance) if who == "torch.compile" else None
    runs = {
        "qts_kernels": lambda: qts_kernels.relevance(query, key),
        "eager": lambda: eager_relevance(query, key),
        "torch.compile": lambda: compiled(query, key),
    }
    if who == "flash-colreduce":
        runs[who] = colreduce(query, key, device)
        assert_within_budget(runs[who](), runs["eager"](), eager_relevance(query.double(), key.double()), atol=1e-4)
    if who == "qts_kernels":
        check(runs[who](), runs["eager"](), eager_relevance(query.double(), key.double()))
    work = relevance_work(shape, DTYPES[dtype]) if who == "qts_kernels" else None
    timed("relevance", name(shape, dtype), who, runs[who], work=work)


@pytest.mark.parametrize("who", ["qts_kernels", "qts_kernels, forward alone", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relevance_backward(timed, device, shape, dtype, who):
    """Forward and backward; the forward alone beside it, for what the backward adds."""
    m, _, heads, kv_heads, length = shape
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    query = torch.randn(1, length, heads, HEAD_DIM, **draw).to(DTYPES[dtype]).requires_grad_()
    key = torch.randn(1, m, kv_heads, HEAD_DIM, **draw).to(DTYPES[dtype]).requires_grad_()
    weight = torch.rand(1, m, **draw)

    def gradients(score, *inputs):
        return torch.autograd.grad((score(*inputs) * weight).sum(), inputs)

    runs = {
        "qts_kernels": lambda: gradients(qts_kernels.relevance, query, key),
        "qts_kernels, forward alone": lambda: qts_kernels.relevance(query, key),
        "eager": lambda: gradients(eager_relevance, query, key),
    }
    if who == "qts_kernels":
        exact = gradients(eager_relevance, *(x.detach().double().requires_grad_() for x in (query, key)))
        for ours, eager, fine in zip(runs[who](), runs["eager"](), exact, strict=True):
            assert_within_budget(ours, eager, fine)
    timed("relevance, forward and backward", name(shape, dtype), who, runs[who])


@pytest.mark.parametrize("who", ["qts_kernels", "one video of their length"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.inference_mode()
def test_ragged_batch(timed, device, shape, dtype, who):
    """Scores and Top-n of eight videos of different lengths, against as many tokens of one."""
    m, _, heads, kv_heads, length = shape
    lengths = [m * share // 36 for share in range(1, 9)]
    lengths[-1] += m - sum(lengths)
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    query = torch.randn(8 * length, heads, HEAD_DIM, **draw).to(DTYPES[dtype])
    key = torch.randn(m, kv_heads, HEAD_DIM, **draw).to(DTYPES[dtype])
    eighth = query[:length]
    cu_query = torch.arange(0, 8 * length + 1, length, dtype=torch.int32, device=device)
    cu_key = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    kept = torch.tensor([of // 10 for of in lengths], device=device)

    def batch():
        scores = qts_kernels.relevance(query, key, cu_seqlens_q=cu_query, cu_seqlens_k=cu_key)
        return qts_kernels.topn(scores, kept, cu_seqlens=cu_key, max_n=max(lengths) // 10)[0]

    def one():
        return qts_kernels.topn(qts_kernels.relevance(eighth[None], key[None]), m // 10)[0]

    if who == "qts_kernels":
        parts = zip(query.split(length), key.split(lengths), kept.tolist(), strict=True)
        alone = [qts_kernels.topn(qts_kernels.relevance(q[None], k[None]), n)[0] for q, k, n in parts]
        starts = cu_key[:-1].tolist()
        expected = torch.cat([of + start for of, start in zip(alone, starts, strict=True)])
        shared = torch.isin(batch()[: len(expected)], expected).float().mean()
        assert shared > 0.999  # scores within rounding of each other may trade places at a border
    shape_name = f"{name(shape, dtype)}, 8 videos"
    timed("relevance + topn", shape_name, who, {"qts_kernels": batch, "one video of their length": one}[who])


def colreduce(query, key, device):
    """The peer, with the head expansion and the reduction over heads that it lacks."""
    if device == "cpu" or importlib.util.find_spec("flash_colreduce") is None:
        pytest.skip("flash-colreduce runs on a GPU and where it is installed")
    from flash_colreduce import flash_colreduce

    group = query.shape[2] // key.shape[2]

    def run():
        wide = key.repeat_interleave(group, dim=2).transpose(1, 2).contiguous()
        return flash_colreduce(query.transpose(1, 2).contiguous(), wide, reduction="max").amax(1)

    return run
