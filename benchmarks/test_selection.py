"""Top-n, gather, 1/rms and soft threshold against what people write today."""

import importlib.util

import pytest
import torch
from ceilings import Work

import qts_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def eager_topn(scores, n):
    return torch.topk(scores, n).indices.sort().values


def scores_of(m, device):
    return torch.rand(m, device=device, generator=torch.Generator(device).manual_seed(0))


ON_THE_DEVICE = "qts_kernels, n on the device"


@pytest.mark.parametrize("who", ["qts_kernels", ON_THE_DEVICE, "torch.topk + sort", "flashinfer top_k + sort"])
@pytest.mark.parametrize("m,n", [(10_000, 1_000), (100_000, 10_000), (1_000_000, 100_000)])
def test_topn(timed, device, m, n, who):
    scores = scores_of(m, device)
    count = torch.tensor([n], device=device)
    runs = {
        "qts_kernels": lambda: qts_kernels.topn(scores, n)[0],
        ON_THE_DEVICE: lambda: qts_kernels.topn(scores, count, max_n=n)[0],
        "torch.topk + sort": lambda: eager_topn(scores, n),
    }
    if who.startswith("flashinfer"):
        if device == "cpu" or importlib.util.find_spec("flashinfer") is None:
            pytest.skip("FlashInfer runs on a GPU and where it is installed")
        from flashinfer import top_k

        runs[who] = lambda: top_k(scores[None], n, deterministic=True)[1][0].sort().values
    exact = torch.sort(scores.cpu(), descending=True, stable=True).indices[:n].sort().values
    if who in ("qts_kernels", ON_THE_DEVICE):
        assert torch.equal(runs[who]().cpu(), exact)
    else:  # their ties may fall otherwise: the scores they keep must still be the best
        assert torch.equal(scores.cpu()[runs[who]().cpu()].sort().values, scores.cpu()[exact].sort().values)
    # FlashInfer chooses its kernel by the values, on the host: no graph holds that.
    graph = not who.startswith("flashinfer")
    timed("topn", f"fp32 M={m} n={n}", who, runs[who], graph=graph, work=Work(bytes=4 * m + 8 * n))


@pytest.mark.parametrize("who", ["qts_kernels", "torch.topk + sort + index_select"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [2048, 3584])
def test_topn_gather(timed, device, d, dtype, who):
    m, n = 100_000, 10_000
    scores = scores_of(m, device)
    tokens = torch.empty(m, d, device=device, dtype=DTYPES[dtype]).normal_()
    runs = {
        "qts_kernels": lambda: qts_kernels.topn_gather(tokens, scores, n).tokens,
        "torch.topk + sort + index_select": lambda: tokens.index_select(0, eager_topn(scores, n)),
    }
    exact = torch.sort(scores.cpu(), descending=True, stable=True).indices[:n].sort().values
    assert torch.equal(runs[who](), tokens[exact.to(device)])
    work = Work(bytes=4 * m + 2 * n * d * tokens.element_size())
    timed("topn_gather", f"{dtype} M={m} n={n} D={d}", who, runs[who], work=work)


@pytest.mark.parametrize("who", ["qts_kernels", "eager", "torch.compile"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_scale(timed, device, dtype, who):
    x = torch.empty(16384, 2048, device=device, dtype=DTYPES[dtype]).normal_()

    def eager(x):
        return (x.float().square().mean(-1) + 1e-6).rsqrt()

    compiled = torch.compile(eager) if who == "torch.compile" else None
    runs = {
        "qts_kernels": lambda: qts_kernels.rms_scale(x),
        "eager": lambda: eager(x),
        "torch.compile": lambda: compiled(x),
    }
    torch.testing.assert_close(runs[who](), eager(x.double()).float(), rtol=1e-5, atol=0)
    timed("rms_scale", f"{dtype} M=16384 D=2048", who, runs[who], work=Work(bytes=x.numel() * x.element_size()))


@pytest.mark.parametrize("who", ["qts_kernels", "eager bisection"])
@pytest.mark.parametrize("m", [1_000, 100_000])
def test_soft_threshold(timed, device, m, who):
    scores = scores_of(m, device)[None]
    rho, tau = torch.tensor([0.1], device=device), 0.1

    def eager():
        shift = tau * torch.logit(rho)
        low, high = scores.amin(1) - shift, scores.amax(1) - shift
        for _ in range(40):
            middle = (low + high) / 2
            above = torch.sigmoid((scores - middle[:, None]) / tau).mean(1) > rho
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2

    runs = {"qts_kernels": lambda: qts_kernels.soft_threshold(scores, rho, tau), "eager bisection": eager}
    kept = torch.sigmoid((scores.double() - runs[who]().double()[:, None]) / tau).mean(1)
    torch.testing.assert_close(kept, rho.double(), rtol=1e-4, atol=0)
    timed("soft_threshold", f"fp32 M={m}", who, runs[who])
