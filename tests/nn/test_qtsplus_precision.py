"""Error budgets in low precision, gradcheck of the whole re-encoder, autocast."""

import pytest
import torch
from selector_oracle import make_selector, select_one

from qts_kernels.testing import assert_within_budget


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_the_error_budget(device, dtype):
    m, length = 300, 9
    module = make_selector(64, 4, 2, scoring_layers=2, reencode_layers=2, time_scale=0.05).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x, question = (torch.randn(size, 64, generator=generator).to(device, dtype) for size in (m, length))
    seconds = torch.linspace(0, 60, m, device=device)
    module.to(device)
    ours = module(x[None], question[None], timestamps=seconds[None])
    assert ours.scores.dtype == ours.rho.dtype == torch.float32
    assert ours.tokens.dtype == dtype
    # The budget is of the arithmetic: all three re-encode the rows that ours selected.
    kept = ours.indices[: int(ours.n[0])]
    eager = select_one(module, x, question, seconds, kept)
    exact = select_one(module.double(), x.double(), question.double(), seconds, kept)
    assert_within_budget(ours.scores[0], eager.scores, exact.scores)
    assert_within_budget(ours.rho[0], eager.rho, exact.rho)
    assert_within_budget(ours.tokens[: len(kept)], eager.tokens, exact.tokens)


@torch.no_grad()
def test_bfloat16_scores_have_few_ties():
    module = make_selector(64, 4, 2).bfloat16()
    x = torch.randn(1, 4000, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    scores = module(x, x[:, :5]).scores
    assert scores.unique().numel() > 0.95 * 4000
    assert scores.bfloat16().unique().numel() < 0.5 * 4000  # what a softmax cast back to bfloat16 would leave


def test_gradcheck_of_the_reencoder():
    module = make_selector(8, 4, 2, reencode_layers=2).double()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(9, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    indices = torch.tensor([0, 2, 3, 5, 7, 8, -1])
    cu_seqlens = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    seconds = torch.linspace(0, 9, 9, dtype=torch.float64)
    names = [n for n, _ in module.named_parameters() if n.startswith(("reencode_layers", "time_embedding"))]
    parameters = [module.get_parameter(name) for name in names]

    def run(tokens, *parameters):
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            Reencode(module), {f"selector.{k}": v for k, v in state.items()}, (tokens, indices, cu_seqlens, seconds)
        )

    assert torch.autograd.gradcheck(run, (tokens, *parameters), fast_mode=True)


class Reencode(torch.nn.Module):
    def __init__(self, selector):
        super().__init__()
        self.selector = selector

    def forward(self, tokens, indices, cu_seqlens, seconds):
        return self.selector.reencode(tokens, indices, cu_seqlens, 4, seconds)


def test_gradcheck_through_scores_and_rho():
    module = make_selector(8, 4, 2, scoring_layers=2).double()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    question = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator, requires_grad=True)

    def run(x, question):
        out = module(x, question)
        return out.scores, out.rho, out.entropy

    assert torch.autograd.gradcheck(run, (x, question), fast_mode=True)


def test_autocast_trains_float32_parameters():
    module = make_selector(64, 4, 2, scoring_layers=2).train()
    x = torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, x[:, :5], timestamps=torch.rand(1, 60))
        assert out.scores.dtype == out.rho.dtype == torch.float32
        assert out.tokens.dtype == torch.float32
    (out.scores.square().sum() + out.rho.sum() + out.tokens.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    plain = module(x, x[:, :5])
    torch.testing.assert_close(out.rho, plain.rho, rtol=1e-2, atol=1e-2)
