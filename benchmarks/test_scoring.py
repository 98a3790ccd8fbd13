"""Scoring raw vision tokens, what QTSplus's scorer does: 1/rms, key projection, relevance. And relevance alone, keys
given."""

import importlib.util

import pytest
import torch
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


def check(ours, eager, exact):
    assert_within_budget(ours, eager, exact, atol=1e-7)


def referred(run):
    """``run`` with every op served by its eager reference."""

    def call():
        with backends.force("reference"):
            return run()

    return call


SCORERS = [
    "qts_kernels",
    "eager reference",
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
        "eager reference": referred(lambda: our_scorer(x, folded, query)),
        "eager, as a model writes it": lambda: eager_scorer(x, norm, weight, query),
        "eager, as released": lambda: released_layer(x, norm, weight, query),
        "torch.compile": lambda: compiled(x, norm, weight, query),
        "key projection GEMM alone": lambda: F.linear(x, folded),
    }
    if who == "qts_kernels":
        exact = eager_scorer(x.double(), norm.double(), weight.double(), query.double())
        check(runs[who](), runs["eager, as a model writes it"](), exact)
    timed("score raw tokens", name(shape, dtype), who, runs[who])


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
    timed("relevance", name(shape, dtype), who, runs[who])


def colreduce(query, key, device):
    """The peer, with the head expansion and the reduction over heads that it lacks."""
    if device == "cpu" or importlib.util.find_spec("flash_colreduce") is None:
        pytest.skip("flash-colreduce runs on a GPU and where it is installed")
    from flash_colreduce import flash_colmax

    group = query.shape[2] // key.shape[2]

    def run():
        wide = key.repeat_interleave(group, dim=2).transpose(1, 2).contiguous()
        return flash_colmax(query.transpose(1, 2).contiguous(), wide).amax(1)

    return run
