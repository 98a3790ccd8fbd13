"""The gates' gradient through the re-encoder's attention, against the formula written down densely in float64."""

import pytest
import torch

from qts_kernels.nn import gate_attention as module
from qts_kernels.nn.gate_attention import gate_attention
from qts_kernels.ops.reencode.attention import varlen_attention
from qts_kernels.testing import assert_within_budget, ragged_cu_seqlens

LENGTHS = [11, 1, 0, 30]
KEPT = [[0, 3, 4, 10], [0], [], [5, 6, 29]]
HEADS, KV_HEADS, WIDTH = 4, 2, 8


def draw(dtype=torch.float64, scale=1.0):
    """query [T, H, Dh] and key, value [T, Hkv, Dh] of all tokens, hard gates [T], rows kept [N], cu of both."""
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    query = torch.randn(total, HEADS, WIDTH, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    key, value = (torch.randn(total, KV_HEADS, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    cu = ragged_cu_seqlens(LENGTHS)
    kept = torch.tensor([int(cu[s]) + row for s, rows in enumerate(KEPT) for row in rows])
    gate = torch.zeros(total, dtype=torch.float64).index_fill(0, kept, 1)
    return query, key.to(dtype), value.to(dtype), gate, kept, ragged_cu_seqlens(list(map(len, KEPT))), cu


def dense(query, key, value, gate, kept, cu_kept, cu):
    """sum_j g_j e^l v_j / sum_j g_j e^l, a segment and a head at a time."""
    out = torch.zeros(len(kept), HEADS, WIDTH, dtype=query.dtype)
    for s in range(len(LENGTHS)):
        for row in range(int(cu_kept[s]), int(cu_kept[s + 1])):
            keys = slice(int(cu[s]), int(cu[s + 1]))
            for head in range(HEADS):
                of = head // (HEADS // KV_HEADS)
                weight = gate[keys] * (key[keys, of] @ query[kept[row], head] / WIDTH**0.5).exp()
                out[row, head] = weight @ value[keys, of] / weight.sum()
    return out


def ours(query, key, value, gate, kept, cu_kept, cu):
    attended = varlen_attention(query[kept], key[kept], value[kept], cu_kept, int(cu_kept.diff().max()))
    return gate_attention(attended, query[kept], key, value, gate, cu_kept, cu)


def gradients(run, inputs, weights):
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:4]]
    (run(*leaves, *inputs[4:]) * weights).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("logits", [1, 7 * HEADS * 11, module.LOGITS])
def test_value_and_every_gradient_are_those_of_the_formula(logits, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", logits)
    inputs = draw()
    weights = torch.randn(len(inputs[4]), HEADS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(*inputs), dense(*inputs), rtol=1e-12, atol=1e-12)
    expected = gradients(dense, inputs, weights)
    for name, a, b in zip(("query", "key", "value", "gate"), gradients(ours, inputs, weights), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    dropped = inputs[3] == 0
    assert (expected[3][dropped] != 0).all()  # the dropped are told as well


def test_gradcheck_in_the_gates():
    """The forward of ours does not move with the gates (it keeps or drops), so the formula takes its place there."""
    query, key, value, gate, *rest = draw()

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate):
            return dense(query, key, value, gate, *rest)

        @staticmethod
        @torch.enable_grad()
        def backward(ctx, grad):
            return gradients(ours, (query, key, value, gate, *rest), grad)[3]

    assert torch.autograd.gradcheck(Formula.apply, (gate.clone().requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_within_that_of_eager(dtype):
    exact = draw()
    half = [x.to(dtype) for x in exact[:3]]
    weights = torch.randn(len(exact[4]), HEADS, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    want = gradients(dense, (*(x.double() for x in half), exact[3], *exact[4:]), weights)[3]
    eager = gradients(dense, (*half, exact[3].to(dtype), *exact[4:]), weights.to(dtype))[3]
    got = gradients(ours, (*half, exact[3].float(), *exact[4:]), weights.to(dtype))[3]
    assert_within_budget(got, eager, want, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_a_dropped_token_that_outshines_all_kept_ones_gives_finite_gradients():
    inputs = draw(torch.float32, scale=1000.0)
    gate = gradients(ours, (*inputs[:3], inputs[3].float(), *inputs[4:]), torch.ones(len(inputs[4]), HEADS, WIDTH))[3]
    assert gate.isfinite().all()
    assert gate.abs().max() > 1e6


def test_the_forward_is_the_attention_over_the_kept_bit_for_bit():
    inputs = draw(torch.float32)
    query, key, value, _, kept, cu_kept, _ = inputs
    plain = varlen_attention(query[kept], key[kept], value[kept], cu_kept, int(cu_kept.diff().max()))
    assert torch.equal(ours(*inputs), plain)
