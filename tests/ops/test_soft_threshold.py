"""soft_threshold: the gates add up to the wanted share, whatever the scores; against fp64 bisection and algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qts_kernels
from qts_kernels import _native, backends
from qts_kernels.testing import poisoned_memory, ragged_cu_seqlens

NATIVE = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))
TAUS = (1e-6, 1e-3, 0.1, 0.5, 30.0, 1e3)
SHARES = (1e-6, 1e-3, 0.05, 0.3, 0.5, 0.7, 0.999, 1 - 1e-6)

KINDS = {
    "normal": lambda m, g: torch.randn(m, generator=g),
    "softmax": lambda m, g: torch.randn(m, generator=g).mul(3).softmax(0),
    "two values": lambda m, g: (torch.arange(m) < m // 3).float(),
    "bimodal": lambda m, g: (torch.arange(m) < m // 2).float() + torch.randn(m, generator=g) * 1e-3,
    "heavy tails": lambda m, g: torch.randn(m, generator=g) / torch.randn(m, generator=g).abs().clamp(min=1e-6),
    "constant": lambda m, g: torch.full((m,), 0.3),
    "one outlier": lambda m, g: torch.zeros(m).index_fill_(0, torch.tensor([m - 1]), 1e6),
    "huge": lambda m, g: torch.randn(m, generator=g).clamp(-3, 3) * 1e38,
}


def excess(scores, t, rho, tau):
    """sum sigmoid((r - t) / tau) - rho M in fp64. Each gate is taken from its nearer end, which keeps the digits."""
    distance = (scores.double() - t.double()) / tau
    rest = torch.sigmoid(-distance.abs())
    above = distance > 0
    return above.sum() - rho.double() * scores.numel() + torch.where(above, -rest, rest).sum()


def exact_threshold(scores, rho, tau):
    """fp64 bisection on ``excess``, within the values that t can take."""
    r = scores.double()
    shift = tau * torch.logit(rho.double())
    low, high = r.min() - shift, r.max() - shift
    for _ in range(120):
        middle = low + (high - low) / 2
        if excess(scores, middle, rho, tau) > 0:
            low = middle
        else:
            high = middle
    return low + (high - low) / 2


def assert_solves(scores, t, rho, tau):
    """t is within fp32's rounding of the root, or the gates add up as well as they do at the root rounded to fp32."""
    want = exact_threshold(scores, rho, tau)
    largest = max(scores.abs().max().item(), want.abs().item())
    near = abs(t.item() - want.item()) <= 2 * torch.finfo(torch.float32).eps * largest + 1e-6 * tau
    left, rounded = (excess(scores, x, rho, tau).abs().item() for x in (t, want.float()))
    smaller = min(rho.double().item(), 1 - rho.double().item()) * scores.numel()
    assert near or left <= 2 * rounded + 1e-6 * smaller, f"t {t.item()}, root {want.item()}, left {left:.3e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tau", TAUS)
def test_the_gates_add_up(device, kind, tau):
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 2, 17, 900]
    parts = [KINDS[kind](m, generator) for m in lengths]
    scores = torch.cat(parts).to(device)
    for share in SHARES:
        rho = torch.full((len(lengths),), share, device=device)
        with poisoned_memory():
            t = qts_kernels.soft_threshold(scores, rho, tau, cu_seqlens=ragged_cu_seqlens(lengths, device))
        assert t.dtype == torch.float32
        for part, one, r in zip(parts, t.cpu(), rho.cpu(), strict=True):
            assert_solves(part, one, r, tau)


@NATIVE
@pytest.mark.parametrize("kind", KINDS)
def test_native_agrees_with_the_reference(kind):
    """To fp32's rounding, where the root is well determined: the reference halves its bracket 60 times in fp64."""
    scores = KINDS[kind](100_000, torch.Generator().manual_seed(1))
    rho, tau = torch.tensor([0.137]), 0.2 * scores.double().std().item() + 1e-3
    results = []
    for name in ("native", "reference"):
        with backends.force(name, "soft_threshold"):
            results.append(qts_kernels.soft_threshold(scores, rho, tau, cu_seqlens=ragged_cu_seqlens([100_000])).item())
    largest = max(scores.abs().max().item(), abs(results[1]), tau)
    assert abs(results[0] - results[1]) <= 2 * torch.finfo(torch.float32).eps * largest


@NATIVE
def test_threads_do_not_change_a_bit():
    scores = torch.randn(3, 270_000, generator=torch.Generator().manual_seed(0))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with backends.force("native", "soft_threshold"):
                results.append(qts_kernels.soft_threshold(scores, torch.full((3,), 0.2), 0.1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_a_constant_score_has_a_closed_form(device):
    t = qts_kernels.soft_threshold(torch.full((1, 9), 0.25, device=device), torch.tensor([0.8], device=device), 0.5)
    want = 0.25 - 0.5 * torch.logit(torch.tensor([0.8], dtype=torch.float64))
    assert t.item() == pytest.approx(want.item(), rel=1e-6)


def test_the_sign_of_scores_mirrors_the_threshold(device):
    scores = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).to(device)
    rho = torch.tensor([0.25, 0.125], device=device)
    up, down = qts_kernels.soft_threshold(scores, rho, 0.3), qts_kernels.soft_threshold(-scores, 1 - rho, 0.3)
    torch.testing.assert_close(up, -down, rtol=1e-6, atol=1e-6)


def test_empty_segments_have_threshold_zero(device):
    with poisoned_memory():
        t = qts_kernels.soft_threshold(
            torch.tensor([1.0, 1.0], device=device),
            torch.full((3,), 0.5, device=device),
            0.1,
            cu_seqlens=ragged_cu_seqlens([0, 2, 0], device),
        )
    assert t.tolist() == [0, 1, 0]


def test_nan_stays_in_its_segment(device):
    scores = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 1.0, 2.0]], device=device)
    t = qts_kernels.soft_threshold(scores, torch.full((2,), 0.5, device=device), 0.1)
    assert t[0].isnan()
    assert t[1].isfinite()


SCORE = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=60, deadline=None)
@given(st.lists(SCORE, min_size=1, max_size=40), st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1e3))
def test_any_scores(scores, share, tau):
    scores, rho = torch.tensor(scores), torch.tensor([share]).clamp(1e-6, 1 - 2**-20)
    t = qts_kernels.soft_threshold(scores[None], rho, tau)
    assert t.isfinite().all()
    assert_solves(scores, t[0], rho[0], tau)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 0.98), st.floats(0.01, 10))
def test_a_larger_share_has_a_lower_threshold(seed, share, tau):
    scores = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
    low, high = (qts_kernels.soft_threshold(scores, torch.tensor([r]), tau) for r in (share, share + 0.01))
    assert high < low


def test_gradcheck(device):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(9, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    rho = torch.tensor([0.2, 0.6, 0.4], dtype=torch.float64, device=device).requires_grad_()
    cu = ragged_cu_seqlens([4, 4, 1], device)
    assert torch.autograd.gradcheck(lambda s, r: qts_kernels.soft_threshold(s, r, 0.7, cu_seqlens=cu), (scores, rho))


@NATIVE
def test_saturated_gates_have_no_gradient(device):
    scores = torch.tensor([[0.0, 1.0]], device=device).requires_grad_()
    rho = torch.tensor([0.5], device=device).requires_grad_()
    qts_kernels.soft_threshold(scores, rho, 1e-4).sum().backward()
    assert scores.grad.tolist() == [[0, 0]]
    assert rho.grad.tolist() == [0]


def test_opcheck(device):
    scores = torch.randn(30, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    rho = torch.tensor([0.2, 0.6], device=device).requires_grad_()
    args = (scores, rho, ragged_cu_seqlens([10, 20], device), 0.5)
    torch.library.opcheck(torch.ops.qts_kernels.soft_threshold.default, args)


def test_compiles_without_a_graph_break(device):
    scores, rho = torch.linspace(0, 1, 40, device=device).view(2, 20), torch.tensor([0.2, 0.6], device=device)

    def run(scores, rho):
        return qts_kernels.soft_threshold(scores * 2, rho, 0.1) + 1

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(scores, rho), run(scores, rho))


@pytest.mark.parametrize(
    "error,match,arguments",
    [
        (TypeError, r"scores must be a tensor \[B, M\], got list", {"scores": [1.0]}),
        (ValueError, r"scores must have shape \[B, M\], got \[6\]", {"scores": torch.zeros(6)}),
        (TypeError, "scores must be float32 or float64, got bfloat16", {"scores": torch.zeros(2, 3).bfloat16()}),
        (ValueError, "at least one segment", {"scores": torch.zeros(0, 4), "rho": torch.zeros(0)}),
        (ValueError, r"rho must have shape \[S\]", {"rho": torch.tensor(0.5)}),
        (ValueError, "rho must have one entry for each of 2 segments", {"rho": torch.tensor([0.5])}),
        (TypeError, "rho must have the dtype of scores", {"rho": torch.tensor([0.5, 0.5]).double()}),
        (ValueError, r"rho must be in \(0, 1\), got 1.0", {"rho": torch.tensor([0.5, 1.0])}),
        (ValueError, r"rho must be in \(0, 1\), got 0.0", {"rho": torch.tensor([0.0, 0.5])}),
        (ValueError, r"rho must be in \(0, 1\), got nan", {"rho": torch.tensor([0.5, float("nan")])}),
        (ValueError, "tau must be above 0, got 0", {"tau": 0}),
        (ValueError, "tau must be above 0, got nan", {"tau": float("nan")}),
        (
            ValueError,
            "must end at the number of packed rows, 6, got 5",
            {"scores": torch.zeros(6), "cu_seqlens": ragged_cu_seqlens([3, 2])},
        ),
    ],
)
def test_bad_input(error, match, arguments):
    with pytest.raises(error, match=match):
        qts_kernels.soft_threshold(
            **{"scores": torch.zeros(2, 3), "rho": torch.tensor([0.5, 0.5]), "tau": 0.1, **arguments}
        )
