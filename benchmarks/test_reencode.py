"""The re-encoder's fused pieces against eager PyTorch and torch.compile of it."""

import pytest
import torch
from ceilings import Work
from torch.nn import functional as F

import qts_kernels
from qts_kernels.nn.reencoder import ReencodeLayer
from qts_kernels.ops.reencode.attention import varlen_attention
from qts_kernels.testing import assert_within_budget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
M, N, D = 16384, 2560, 2048
PIECES = ["gather_add_rms_norm", "add_rms_norm", "bias_gelu"]


def rms_norm(x, weight):
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * weight


def eager_gather(tokens, indices, addend, weight):
    residual = tokens[indices] + addend
    return residual, rms_norm(residual, weight)


def eager_add(x, residual, weight):
    total = x + residual
    return total, rms_norm(total, weight)


def eager_gelu(x, bias):
    return F.gelu(x + bias)


def make(piece, dtype, device):
    draw = {"generator": torch.Generator(device).manual_seed(0), "device": device}

    def randn(*shape):
        return torch.randn(*shape, **draw).to(dtype)

    if piece == "gather_add_rms_norm":
        indices = torch.randperm(M, **draw)[:N].sort().values
        return (randn(M, D), indices, randn(N, D), randn(D)), qts_kernels.gather_add_rms_norm, eager_gather
    if piece == "add_rms_norm":
        return (randn(N, D), randn(N, D), randn(D)), qts_kernels.add_rms_norm, eager_add
    return (randn(N, 4 * D), randn(4 * D)), qts_kernels.bias_gelu, eager_gelu


@pytest.mark.parametrize("who", ["qts_kernels", "eager", "torch.compile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("piece", PIECES)
@torch.inference_mode()
def test_piece(timed, device, piece, dtype, who):
    inputs, ours, eager = make(piece, DTYPES[dtype], device)
    runs = {"qts_kernels": ours, "eager": eager}
    runs["torch.compile"] = torch.compile(eager) if who == "torch.compile" else None
    if who == "qts_kernels":
        exact = eager(*(x.double() if x.is_floating_point() else x for x in inputs))
        results = (ours(*inputs), eager(*inputs), exact)
        for got, rough, fine in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert_within_budget(got, rough, fine)
    moved = {"gather_add_rms_norm": 4, "add_rms_norm": 4, "bias_gelu": 2}[piece] * N * inputs[-1].shape[0]
    work = Work(bytes=moved * DTYPES[dtype].itemsize)
    timed(piece, f"{dtype} N={N} D={inputs[-1].shape[0]}", who, lambda: runs[who](*inputs), work=work)


LAYER = (10_000, 3584, 28, 4) if torch.cuda.is_available() else (1640, 2048, 16, 2)


@pytest.mark.parametrize("who", ["qts_kernels", "its GEMMs and attention alone"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_layer(timed, device, dtype, who):
    """One layer of the re-encoder over one sequence: norms, residuals and GELU beside what can't be avoided."""
    n, d, heads, kv_heads = LAYER
    torch.manual_seed(0)
    layer = ReencodeLayer(d, heads, kv_heads).to(device, DTYPES[dtype]).eval()
    residual, normed = (torch.randn(n, d, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32, device=device)
    core, (up, _, down) = layer.core, layer.core.ffn.net
    key_value = torch.cat([core.k_proj.weight, core.v_proj.weight])
    hidden = torch.randn(n, up.out_features, device=device, dtype=DTYPES[dtype])

    def unavoidable():
        key, value = F.linear(normed, key_value).chunk(2, dim=-1)
        query, key, value = map(core.split_heads, (F.linear(normed, core.q_proj.weight), key, value))
        attended = varlen_attention(query, key, value, cu_seqlens, n)
        F.linear(attended.flatten(1), core.o_proj.weight)
        F.linear(normed, up.weight)
        return F.linear(hidden, down.weight)

    runs = {
        "qts_kernels": lambda: layer(residual, normed, cu_seqlens, n),
        "its GEMMs and attention alone": unavoidable,
    }
    assert all(x.isfinite().all() for x in layer(residual, normed, cu_seqlens, n))
    work = Work(flops=layer_flops(n, d, heads, kv_heads, up.out_features), dtype=DTYPES[dtype])
    timed("re-encoder layer", f"{dtype} N={n} D={d} heads={heads}/{kv_heads}", who, runs[who], work=work)


def layer_flops(n, d, heads, kv_heads, inner):
    projections = 2 * n * d * (2 * d + 2 * d * kv_heads // heads)
    return projections + 4 * n * n * d + 4 * n * d * inner
