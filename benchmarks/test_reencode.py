"""The re-encoder's fused pieces against eager PyTorch and torch.compile of it."""

import pytest
import torch
from torch.nn import functional as F

import qts_kernels
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
    timed(piece, f"{dtype} N={N} D={inputs[-1].shape[0]}", who, lambda: runs[who](*inputs))
