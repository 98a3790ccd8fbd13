"""The whole QTSplus selector, raw tokens in and re-encoded tokens out, against eager PyTorch from the same weights."""

import pytest
import torch
from torch.nn import functional as F

from qts_kernels.nn import QTSplus

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = (100_000, 3584, 28, 4, 64, 10_000) if torch.cuda.is_available() else (16384, 2048, 16, 2, 32, 1640)


def norm(x, weight):
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype) * weight


def heads(x, projection, group=1):
    """[N, D] -> [H, N, 128], the key heads repeated as the release repeats them."""
    return projection(x).unflatten(-1, (-1, 128)).transpose(0, 1).repeat_interleave(group, 0)


def eager_scores(module, x, question):
    layer = module.scoring_layers[-1]
    query = heads(norm(question, layer.q_norm.weight), layer.q_proj)
    key = heads(norm(x, layer.kv_norm.weight), layer.k_proj, query.shape[0] * 128 // layer.k_proj.out_features)
    logits = query @ key.transpose(1, 2) * 128**-0.5
    return logits.softmax(-1, dtype=torch.float32).amax((0, 1))


def eager_reencode(block, z):
    query = heads(norm(z, block.q_norm.weight), block.q_proj)
    group = query.shape[0] * 128 // block.k_proj.out_features
    seen = norm(z, block.kv_norm.weight)
    key, value = heads(seen, block.k_proj, group), heads(seen, block.v_proj, group)
    attended = F.scaled_dot_product_attention(query[None], key[None], value[None])[0]
    z = z + block.o_proj(attended.transpose(0, 1).flatten(1))
    up, _, down = block.ffn.net
    return z + down(F.gelu(up(norm(z, block.ffn_norm.weight))))


def eager(module, x, question, n):
    scores = eager_scores(module, x, question)
    indices = torch.topk(scores, n).indices.sort().values
    return indices, eager_reencode(module.reencode_layers[0].core, x[indices])


@pytest.mark.parametrize("who", ["qts_kernels", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_selector(timed, device, dtype, who):
    m, d, num_heads, kv_heads, length, n = SHAPE
    torch.manual_seed(0)
    module = QTSplus(d, num_heads, kv_heads, n_max=n).to(device, DTYPES[dtype]).eval()
    x = torch.randn(m, d, device=device, dtype=DTYPES[dtype])
    question = torch.randn(length, d, device=device, dtype=DTYPES[dtype])
    runs = {
        "qts_kernels": lambda: module(x[None], question[None], n=n, max_n=n),
        "eager": lambda: eager(module, x, question, n),
    }
    if who == "qts_kernels":
        ours, (indices, tokens) = runs["qts_kernels"](), runs["eager"]()
        assert ours.indices.shape == (n,)
        # Scores within rounding of each other may trade places at the border, and in bf16 eager is tied there.
        shared = torch.isin(ours.indices, indices)
        assert shared.float().mean() > (0.999 if dtype == "fp32" else 0.95)
        if shared.all():
            torch.testing.assert_close(ours.tokens, tokens, rtol=1e-3, atol=1e-3)
    timed("QTSplus selector", f"{dtype} M={m} D={d} heads={num_heads}/{kv_heads} L={length} n={n}", who, runs[who])
