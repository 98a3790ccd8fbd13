"""topn: exactly the best rows, ties and NaN included, on every device, against sorting with numpy. Run as a script it
makes the sweep over the native code alone, for the instruction set that QTS_CPU_ISA names."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from instruction_sets import check_sweep

import qts_kernels
from qts_kernels import _native, backends
from qts_kernels.testing import poisoned_memory, ragged_cu_seqlens

NATIVE = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))
NAN, INF = float("nan"), float("inf")


def oracle(scores, lengths, counts):
    """Rows of the packed axis, by numpy's sort on (NaN last, score descending, index ascending)."""
    packed, kept, sizes, start = scores.cpu().float().numpy(), [], [], 0
    for length, count in zip(lengths, counts, strict=True):
        part = packed[start : start + length]
        missing = np.isnan(part)
        order = np.lexsort((np.arange(length), -np.where(missing, 0, part), missing))
        kept.append(np.sort(order[: min(count, length)]) + start)
        sizes.append(len(kept[-1]))
        start += length
    return torch.from_numpy(np.concatenate(kept)), [0, *np.cumsum(sizes).tolist()]


def check(scores, lengths, counts, max_n=None):
    """topn with a count a segment agrees with the oracle; what lies behind the result is -1."""
    device = scores.device
    n = torch.tensor(counts, device=device)
    with poisoned_memory():
        got, cu = qts_kernels.topn(scores, n, cu_seqlens=ragged_cu_seqlens(lengths, device), max_n=max_n)
    bound = sum(lengths) if max_n is None else max_n
    want, want_cu = oracle(scores, lengths, [min(c, bound) for c in counts])
    assert cu.tolist() == want_cu
    assert got.dtype == torch.int64
    assert got.shape == (min(len(lengths) * min(bound, sum(lengths)), sum(lengths)),)
    assert torch.equal(got[: want_cu[-1]].cpu(), want)
    assert (got[want_cu[-1] :] == -1).all()
    return got, cu


KINDS = {
    "random": lambda m, g: torch.randn(m, generator=g),
    "softmax": lambda m, g: torch.randn(m, generator=g).mul(3).softmax(0),
    "many ties": lambda m, g: torch.randint(0, 3, (m,), generator=g).float(),
    "constant": lambda m, g: torch.full((m,), 0.25),
    "one low bit": lambda m, g: torch.randint(0, 2, (m,), generator=g).int().add(0x3F800000).view(torch.float32),
    "special": lambda m, g: torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1e-45, -1e-45, 1e-38, -1.0, 3e38])[
        torch.randint(0, 10, (m,), generator=g)
    ],
    "any bits": lambda m, g: torch.randint(-(2**31), 2**31, (m,), generator=g).int().view(torch.float32),
    "rising": lambda m, g: torch.arange(m).float(),
    "falling": lambda m, g: torch.arange(m).neg().float(),
    "periodic": lambda m, g: torch.arange(m).remainder(64).float(),
    "steps": lambda m, g: torch.arange(m).mul(64).div(max(m, 1), rounding_mode="floor").float(),
    "two values": lambda m, g: torch.randint(0, 2, (m,), generator=g).sub(0.5),
    "outliers": lambda m, g: torch.randn(m, generator=g).mul(torch.rand(m, generator=g) < 0.01),
    "all NaN": lambda m, g: torch.full((m,), NAN),
    "half NaN": lambda m, g: torch.randn(m, generator=g).sqrt(),
    "infinities": lambda m, g: torch.randint(-1, 2, (m,), generator=g).div(0.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [[1], [31, 33, 0, 512], [513, 2, 5000], [140_001, 7]])
def test_against_sorting(device, kind, lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    scores = KINDS[kind](sum(lengths), generator).to(device)
    for share in (0.0, 0.1, 0.5, 1.0):
        check(scores, lengths, [round(share * length) for length in lengths])
    check(scores, lengths, [1] * len(lengths))
    check(scores, lengths, [length - 1 if length else 0 for length in lengths])
    check(scores, lengths, [length + 3 for length in lengths])
    check(scores, lengths, [length // 2 for length in lengths], max_n=4)


@NATIVE
@pytest.mark.parametrize("kind", KINDS)
def test_native_is_the_reference_bit_for_bit(kind):
    generator = torch.Generator().manual_seed(1)
    for lengths in ([2**20, 1, 33_000], [2**18, 1, 2**18 - 1], [0, 0, 9], [20] * 300, [600, 100] * 400):
        scores = KINDS[kind](sum(lengths), generator)
        n = torch.tensor([length // 3 for length in lengths])
        for max_n in (None, max(lengths) // 4):
            results = []
            for name in ("native", "reference"):
                with backends.force(name, "topn"), poisoned_memory():
                    results.append(qts_kernels.topn(scores, n, cu_seqlens=ragged_cu_seqlens(lengths), max_n=max_n))
            for a, b in zip(*results, strict=True):
                assert a.dtype == b.dtype
                assert torch.equal(a, b)


@NATIVE
def test_threads_do_not_change_a_bit():
    scores = torch.randint(0, 50, (1_800_000,), generator=torch.Generator().manual_seed(0)).float()
    # Threads share segments, by their rows: long ones, short ones, and where one share has many of the others' rows.
    segments = ragged_cu_seqlens([700_000, 3, 0, 500_000, *[1000] * 300, 299_997])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with backends.force("native", "topn"):
                results.append(qts_kernels.topn(scores, 12_345, cu_seqlens=segments)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def check_random_segments(segments, length, n, generator):
    """Distinct scores in so many segments that in some a sample of a segment's rows says nothing about the rest."""
    scores = torch.rand(segments, length, generator=generator).argsort(1).float()
    best = (scores >= length - n).nonzero()  # the scores are the ranks, from 0
    got, _ = qts_kernels.topn(scores, n)
    assert torch.equal(got, best[:, 0] * length + best[:, 1])


def sampled_rows(length, size):
    """The rows of ``length`` that the native code draws as a sample; repeats ``sample`` in csrc/topn/kernels.inl."""
    i = np.arange(size, dtype=np.uint64)
    bits = i * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ bits >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(33)
    return ((i * length + (bits * length >> np.uint64(31))) // size).astype(np.int64)


def misleading_scores(length, generator):
    """Scores of which two samples in a row hold the best alone, so that both brackets for the median miss it, and the
    second leaves almost all rows. The first bracket takes off the sample's best 79 (64 and 2.5 standard deviations)."""
    first = sampled_rows(length, 128)
    rest = np.setdiff1d(np.arange(length), first[:79])
    second = np.setdiff1d(rest[sampled_rows(len(rest), 128)], first)
    others = np.setdiff1d(rest, np.concatenate([first, second]))
    others = others[torch.randperm(len(others), generator=generator).numpy()]
    scores = torch.empty(length)
    scores[torch.from_numpy(np.concatenate([first, second, others]))] = torch.arange(length, 0, -1).float()
    return scores


# Around each size from which the native code does something else: vectors, the keys that are ranked at once, the blocks
# of rows that are written at once, and the sizes of the sample.
BOUNDS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 2**14 - 1, 2**14, 2**14 + 1, 100_003)
LARGE_BOUNDS = (2**18 - 1, 2**18, 2**18 + 17)


def sweep():
    generator = torch.Generator().manual_seed(2)
    for make in KINDS.values():
        for length in BOUNDS:
            scores = make(length, generator)
            counts = {0, 1, 2, length // 100, length // 10, length // 2, length - 2, length - 1}
            for n in sorted(counts):
                check(scores, [length], [max(n, 0)])
    for length in LARGE_BOUNDS:
        for kind in ("random", "many ties", "special"):
            scores = KINDS[kind](length, generator)
            for n in (1, length // 3, length - 1):
                check(scores, [length], [n])
    for length in (70, 300):
        for n in (3, length // 2, length - 2):
            check_random_segments(20_000, length, n, generator)
    for n in (100, 5_000, 10_000):
        check_random_segments(30, 20_000, n, generator)
    check(misleading_scores(20_000, generator), [20_000], [10_000])


@NATIVE
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_and_size(isa):
    check_sweep(isa, __file__)


@NATIVE
def test_subnormal_scores_count_where_arithmetic_flushes_them():
    scores = torch.tensor([3, -1, 7, 0, -(2**31), 5]).int().repeat(50).view(torch.float32)
    try:
        torch.set_flush_denormal(True)
        with backends.force("native", "topn"):
            got = qts_kernels.topn(scores, 150)[0]
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, torch.arange(300).view(50, 6)[:, [0, 2, 5]].flatten())


def test_the_order_of_special_values(device):
    """+inf first, then finite, -inf, NaN of any sign and payload last; -0 is +0, so the lower index wins."""
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    scores = torch.cat([negative_nan, torch.tensor([NAN, -INF, -0.0, 0.0, -1e-45, 1e-45, INF])]).to(device)
    ranking = [7, 6, 3, 4, 5, 2, 0, 1]
    for n in range(9):
        assert qts_kernels.topn(scores, n)[0].tolist() == sorted(ranking[:n])


def test_ties_go_to_the_lowest_indices(device):
    scores = torch.tensor([1.0, 2.0] * 40_000, device=device)
    kept = qts_kernels.topn(scores, 40_003)[0]
    assert kept[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert kept[6:].tolist() == list(range(7, 80_000, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores(device, dtype):
    scores = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    assert torch.equal(qts_kernels.topn(scores, 200)[0], qts_kernels.topn(scores.float(), 200)[0])


def test_dense_is_one_segment_a_row(device):
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(device)
    got, cu = qts_kernels.topn(scores, 7)
    assert cu.tolist() == [0, 7, 14, 21]
    for row in range(3):
        alone = qts_kernels.topn(scores[row], 7)[0]
        assert torch.equal(got[7 * row : 7 * row + 7], alone + 50 * row)


def test_scores_need_not_be_contiguous(device):
    scores = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(device).t()
    assert torch.equal(qts_kernels.topn(scores, 9)[0], qts_kernels.topn(scores.contiguous(), 9)[0])


def test_no_scores_at_all(device):
    for shape, segments in (((0,), 1), ((3, 0), 3)):
        got, cu = qts_kernels.topn(torch.empty(shape, device=device), 4)
        assert got.shape == (0,)
        assert cu.tolist() == [0] * (segments + 1)


def test_counts_of_any_integer_type_are_clamped(device):
    scores = torch.arange(10.0, device=device).view(2, 5)
    for dtype in (torch.int32, torch.int64):
        n = torch.tensor([2, 2**31 - 1], dtype=dtype, device=device)
        got, cu = qts_kernels.topn(scores, n)
        assert cu.tolist() == [0, 2, 7]
        assert got.tolist() == [3, 4, 5, 6, 7, 8, 9, -1, -1, -1]
    got, cu = qts_kernels.topn(scores, n, max_n=3)
    assert got.tolist() == [3, 4, 7, 8, 9, -1]


SCORE = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, NAN, INF, -INF]))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.lists(SCORE, max_size=70), st.integers(0, 80)), min_size=1, max_size=5))
@example([([], 3), ([NAN], 1)])
def test_any_scores(segments):
    lengths = [len(s) for s, _ in segments]
    scores = torch.tensor([x for s, _ in segments for x in s], dtype=torch.float32)
    got, cu = check(scores, lengths, [n for _, n in segments])
    for start, stop in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        assert (got[start:stop].diff() > 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(600, 3000), st.integers(0, 2**32), st.integers(0, 3000))
def test_keeping_and_leaving_share_the_rows(rows, seed, n):
    """What n keeps, and what the rest would keep of the negated scores, are all rows once (no ties, no NaN)."""
    scores = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).float()
    kept, left = qts_kernels.topn(scores, n)[0], qts_kernels.topn(-scores, max(0, rows - n))[0]
    assert torch.equal(torch.cat([kept, left]).sort().values, torch.arange(rows))


def test_opcheck(device):
    scores = torch.randn(30, generator=torch.Generator().manual_seed(0)).to(device)
    n = torch.tensor([3, 9], device=device)
    args = (scores, ragged_cu_seqlens([10, 20], device), n, 9)
    torch.library.opcheck(torch.ops.qts_kernels.topn.default, args)


def test_compiles_without_a_graph_break(device):
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).to(device)
    n = torch.tensor([3, 9], device=device)

    def run(scores, n):
        indices, cu = qts_kernels.topn(scores * 2, n, max_n=12)
        return indices + 1, cu

    for a, b in zip(torch.compile(run, fullgraph=True)(scores, n), run(scores, n), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_graph_capture_follows_n_and_scores():
    scores, n = torch.randn(2, 5000, device="cuda"), torch.tensor([5, 900], device="cuda")
    qts_kernels.topn(scores, n, max_n=1000)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, cu = qts_kernels.topn(scores, n, max_n=1000)
    for counts in ([0, 1000], [17, 3]):
        scores.normal_()
        n.copy_(torch.tensor(counts))
        graph.replay()
        want, want_cu = oracle(scores.flatten(), [5000, 5000], counts)
        assert cu.tolist() == want_cu
        assert torch.equal(got[: want_cu[-1]].cpu(), want)


@pytest.mark.parametrize(
    "error,match,arguments",
    [
        (TypeError, r"scores must be a tensor \[M\] or \[B, M\], got list", {"scores": [1.0]}),
        (ValueError, r"scores must have shape \[M\] or \[B, M\], got \[1, 1, 4\]", {"scores": torch.zeros(1, 1, 4)}),
        (TypeError, "scores must be float32 or bfloat16 or float16, got float64", {"scores": torch.zeros(4).double()}),
        (ValueError, "at least one segment", {"scores": torch.zeros(0, 4)}),
        (ValueError, "n must not be negative, got -1", {"n": -1}),
        (ValueError, "n must not be negative, got -3", {"n": torch.tensor([-3])}),
        (TypeError, "n must be an int or an int tensor", {"n": 2.0}),
        (TypeError, "n must be an int or an int tensor", {"n": True}),
        (TypeError, "n must be int64 or int32, got float32", {"n": torch.ones(1)}),
        (ValueError, "one entry for each of 1 segments", {"n": torch.tensor([1, 2])}),
        (ValueError, "max_n must not be negative, got -2", {"max_n": -2}),
        (TypeError, "cu_seqlens must be int32, got int64", {"cu_seqlens": torch.tensor([0, 6])}),
        (ValueError, r"cu_seqlens must have shape \[S\+1\]", {"cu_seqlens": torch.tensor([0], dtype=torch.int32)}),
        (ValueError, "must start at 0, got 1", {"cu_seqlens": torch.tensor([1, 6], dtype=torch.int32)}),
        (ValueError, "must end at the number of packed rows, 6, got 5", {"cu_seqlens": ragged_cu_seqlens([5])}),
        (ValueError, "must not decrease, got 7 before 6", {"cu_seqlens": ragged_cu_seqlens([7, -1]), "n": 1}),
        (ValueError, r"scores must have shape \[sum M\]", {"scores": torch.ones(1, 6), "cu_seqlens": torch.zeros(2)}),
    ],
)  # fmt: skip
def test_bad_input(error, match, arguments):
    with pytest.raises(error, match=match):
        qts_kernels.topn(**{"scores": torch.zeros(6), "n": 2, **arguments})


if __name__ == "__main__":
    reason = _native.absent("_C")
    if reason is not None:
        sys.exit(reason)
    with backends.force("native", "topn"):
        sweep()
