"""What only a GPU can show: no synchronisation, CUDA-graph capture with a device-side n, 64-bit addresses, real
shapes. Skipped where torch sees no GPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from qts_kernels import backends, gather_tokens, merge_tokens, relevance, rms_scale, soft_threshold, topn, topn_gather
from qts_kernels.testing import assert_within_budget, poisoned_memory, ragged_cu_seqlens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DEVICE = "cuda"


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Any synchronising call in the context raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(run: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """The graph of one call and its outputs; kernels are compiled before, outside of the capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize(
    "op",
    [
        "relevance", "relevance_backward", "topn", "gather_rows", "rms_scale", "soft_threshold", "allocate_tokens",
        "resize_frames", "resize_frames_backward", "merge_tokens",
    ],
)  # fmt: skip
def test_triton_serves(op):
    served = {(row.op, row.device): row.implementation for row in backends.report()}
    assert served[op, "cuda"] == "triton"


def selection(n: torch.Tensor, query, key, tokens, seconds, cu_q, cu_k):
    scores = relevance(query, key, key_scale=rms_scale(tokens), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, reduce="max")
    return topn_gather(tokens, scores, n, seconds, cu_seqlens=cu_k, max_n=600)


def selection_inputs(seed: int):
    lengths, questions = [3000, 1, 777, 2001], [64, 3, 0, 17]
    total = sum(lengths)
    return (
        draw(sum(questions), 28, 128, dtype=torch.bfloat16, seed=seed),
        draw(total, 4, 128, dtype=torch.bfloat16, seed=seed + 1),
        draw(total, 3584, dtype=torch.bfloat16, seed=seed + 2),
        draw(total, seed=seed + 3),
        ragged_cu_seqlens(questions, DEVICE),
        ragged_cu_seqlens(lengths, DEVICE),
    )


def test_selection_never_synchronises():
    inputs = selection_inputs(0)
    n = torch.ones(4, dtype=torch.int64, device=DEVICE) * 50
    with no_synchronisation():
        selection(n, *inputs)


def test_gradients_never_synchronise():
    query, key, _, _, cu_q, cu_k = selection_inputs(0)
    query.requires_grad_(), key.requires_grad_()
    with no_synchronisation():
        for reduce in ("max", "mean"):
            relevance(query, key, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, reduce=reduce).sum().backward()


def test_captured_selection_follows_n_and_scores():
    inputs = selection_inputs(0)
    n = torch.tensor([50, 1, 30, 20], device=DEVICE)
    graph, replayed = captured(lambda: selection(n, *inputs))
    for seed, counts in ((0, [50, 1, 30, 20]), (10, [600, 0, 777, 1]), (20, [0, 0, 0, 0]), (30, [5000] * 4)):
        n.copy_(torch.tensor(counts))
        for held, fresh in zip(inputs[:4], selection_inputs(seed)[:4], strict=True):
            held.copy_(fresh)
        graph.replay()
        expected = selection(n, *inputs)
        torch.cuda.synchronize()
        assert torch.equal(replayed.indices, expected.indices)
        assert torch.equal(replayed.cu_seqlens, expected.cu_seqlens)
        assert torch.equal(replayed.tokens, expected.tokens)
        assert torch.equal(replayed.extras[0], expected.extras[0])
        with backends.force("reference", "topn"):
            truth, cu = topn(expected.scores, n, cu_seqlens=inputs[5], max_n=600)
        assert torch.equal(replayed.indices, truth)
        assert torch.equal(replayed.cu_seqlens, cu)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("causal", [False, True])
def test_relevance_and_gradients_at_a_real_shape(dtype, reduce, causal):
    cu_q, cu_k = ragged_cu_seqlens([64, 5, 0], DEVICE), ragged_cu_seqlens([5000, 333, 100], DEVICE)
    tensors = [draw(69, 28, 128, dtype=dtype), draw(5433, 4, 128, dtype=dtype, seed=1), draw(5433, seed=2).abs() + 0.5]
    weight = draw(5433, seed=3)

    def run(cast: Callable, implementation: str):
        q, k, s = (cast(x).detach().requires_grad_() for x in tensors)
        with backends.force(implementation):
            scores = relevance(q, k, key_scale=s, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, reduce=reduce, causal=causal)
            grads = torch.autograd.grad((scores * weight).sum(), (q, k, s))
        return scores, *grads

    with poisoned_memory():
        found = run(lambda x: x, "triton")
    eager = run(lambda x: x, "reference")
    exact = run(lambda x: x.double(), "reference")
    for a, b, c in zip(found, eager, exact, strict=True):
        assert_within_budget(a, b, c, atol=2e-6 * max(1.0, c.abs().max().item()))


def test_relevance_gives_the_same_bits_on_every_run():
    inputs = selection_inputs(0)
    for _ in range(3):
        results = [relevance(inputs[0], inputs[1], cu_seqlens_q=inputs[4], cu_seqlens_k=inputs[5]) for _ in range(2)]
        assert torch.equal(*results)


@pytest.mark.parametrize("total", [1, 1000, 100_000, 1_000_003])
@pytest.mark.parametrize("kind", ["softmax", "ties", "special"])
def test_topn_has_the_bits_of_the_reference(total, kind):
    scores = draw(total)
    if kind == "softmax":
        scores = (scores * 4).softmax(0)
    else:
        scores = (scores * 8).round() / 8
    if kind == "special":
        scores[::7], scores[3::11], scores[5::13] = torch.nan, -0.0, -torch.inf
    n = torch.tensor([total // 10 + 1], device=DEVICE)
    cu = ragged_cu_seqlens([total], DEVICE)
    found = topn(scores, n, cu_seqlens=cu, max_n=total // 5 + 1)
    with backends.force("reference"):
        expected = topn(scores, n, cu_seqlens=cu, max_n=total // 5 + 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_soft_threshold_keeps_its_share_and_never_synchronises():
    scores, cu = draw(120_000), ragged_cu_seqlens([20_000, 100_000], DEVICE)
    rho = torch.tensor([0.1, 0.4], device=DEVICE)
    with no_synchronisation():
        t = soft_threshold(scores, rho, 0.1, cu_seqlens=cu)
    for s, (start, stop) in enumerate(((0, 20_000), (20_000, 120_000))):
        kept = torch.sigmoid((scores[start:stop].double() - t[s].double()) / 0.1).mean()
        torch.testing.assert_close(kept, rho[s].double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_captured_merge_follows_counts(dtype):
    """Tokens with a few directions in common, so that no two similarities nearly tie."""
    frames = (draw(6, 225, 40) @ draw(6, 40, 1030, seed=1)).to(dtype)
    counts = torch.tensor([30, 101, 225, 1, 0, 113], device=DEVICE)
    with no_synchronisation():
        merge_tokens(frames, counts, max_tokens=700, with_rows=True)
    graph, replayed = captured(lambda: merge_tokens(frames, counts, max_tokens=700, with_rows=True))
    for held in ([30, 101, 225, 1, 0, 113], [0, 1, 2, 224, 57, 56], [113, 112, 3, 15, 16, 17]):
        counts.copy_(torch.tensor(held))
        graph.replay()
        torch.cuda.synchronize()
        with backends.force("reference", "merge_tokens"):
            eager, exact = (merge_tokens(x, counts, max_tokens=700, with_rows=True) for x in (frames, frames.double()))
        assert torch.equal(replayed[3], exact[3])
        assert_within_budget(replayed[0], eager[0], exact[0])


def enough_memory(gigabytes: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > gigabytes << 30


@pytest.mark.slow
@pytest.mark.skipif(not enough_memory(16), reason="needs 16 GiB of free GPU memory")
def test_gather_and_rms_scale_beyond_32_bit_addresses():
    rows, width = 700_000, 3584  # 2.5e9 elements
    tokens = torch.empty(rows, width, dtype=torch.bfloat16, device=DEVICE)
    tokens[:] = (torch.arange(rows, device=DEVICE) % 251)[:, None] + 1
    indices = torch.tensor([0, 599_186, 599_188, rows - 1, -1], device=DEVICE)
    found = topn_gather(tokens, torch.zeros(rows, device=DEVICE), 1)
    assert torch.equal(found.tokens, tokens[:1])
    expected = torch.cat([tokens[indices[:4]], torch.zeros_like(tokens[:1])])
    assert torch.equal(gather_tokens(tokens, indices), expected)
    scale = rms_scale(tokens, 0.0)
    torch.testing.assert_close(scale[indices[:4]], 1 / tokens[indices[:4], 0].float(), rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(not enough_memory(24), reason="needs 24 GiB of free GPU memory")
def test_relevance_beyond_32_bit_addresses():
    """4.5 million keys of 4 heads of 128: 2.3e9 elements. The last thousand differ from 0."""
    keys, tail = 4_500_000, 1000
    query = draw(4, 4, 128, dtype=torch.bfloat16)
    key = torch.zeros(keys, 4, 128, dtype=torch.bfloat16, device=DEVICE)
    key[-tail:] = draw(tail, 4, 128, dtype=torch.bfloat16, seed=1) * 8
    scores = relevance(query[None], key[None])[0, -tail:]
    logits = torch.einsum("lhd,mhd->hlm", query.double(), key[-tail:].double()) * 128**-0.5
    lse = torch.logaddexp(logits.logsumexp(-1), torch.tensor(keys - tail, device=DEVICE, dtype=torch.float64).log())
    exact = (logits - lse[..., None]).exp().amax((0, 1))
    torch.testing.assert_close(scores.double(), exact, rtol=1e-3, atol=1e-6)
