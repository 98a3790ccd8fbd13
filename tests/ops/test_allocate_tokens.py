"""allocate_tokens: against exact fractions, and what must hold for any weights."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qts_kernels
from qts_kernels import _native, backends
from qts_kernels.testing import poisoned_memory, ragged_cu_seqlens

NATIVE = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))
SERVED = ["reference", pytest.param("native", marks=NATIVE)]
GOLDEN = Path(__file__).parents[1] / "golden" / "quota_a.safetensors"


def oracle(weights, total, caps):
    """Shares in fractions: the tokens per unit of weight rise until everything is given out or every cap is met; who
    has no weight shares equally what then is left."""
    weights, caps = [Fraction(w) for w in weights], [min(c, total) for c in caps]
    if sum(caps) <= total:
        return caps
    weighted = [i for i, w in enumerate(weights) if w]
    if sum(caps[i] for i in weighted) <= total:
        rest = [i for i, w in enumerate(weights) if not w]
        left = total - sum(caps[i] for i in weighted)
        zeros = dict(zip(rest, oracle([1] * len(rest), left, [caps[i] for i in rest]), strict=True))
        return [zeros.get(i, caps[i]) for i in range(len(weights))]
    # Between two neighbouring levels at which a cap is met, what is given out is linear in the level.
    levels = sorted({caps[i] / weights[i] for i in weighted})
    for level in levels:
        if sum(min(weights[i] * level, caps[i]) for i in weighted) >= total:
            met = [i for i in weighted if caps[i] / weights[i] < level]
            open_ = [i for i in weighted if caps[i] / weights[i] >= level]
            level = (total - sum(caps[i] for i in met)) / sum(weights[i] for i in open_)
            break
    shares = [min(w * level, Fraction(c)) for w, c in zip(weights, caps, strict=True)]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


@pytest.mark.parametrize("served", SERVED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_exact_fractions(served, data):
    """Any weights that are small multiples of a power of two, which integers of 53 bits hold exactly."""
    weights = data.draw(st.lists(st.integers(0, 12) | st.integers(0, 1 << 20), min_size=1, max_size=12))
    total = data.draw(st.integers(0, 40) | st.integers(0, 2**31 - 1))
    caps = data.draw(
        st.lists(st.integers(0, 9) | st.integers(0, 1 << 40), min_size=len(weights), max_size=len(weights))
    )
    scale = 2.0 ** data.draw(st.integers(-1000, 900))
    with backends.force(served, "allocate_tokens"), poisoned_memory():
        got = qts_kernels.allocate_tokens(
            torch.tensor(weights, dtype=torch.float64) * scale, total, cap=torch.tensor(caps)
        )
        free = qts_kernels.allocate_tokens(torch.tensor(weights, dtype=torch.float64) * scale, total)
    assert got.tolist() == oracle(weights, total, caps)
    assert free.tolist() == oracle(weights, total, [total] * len(weights))


@pytest.mark.parametrize("served", SERVED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_weights(served, data):
    weights = data.draw(st.lists(st.floats(0, allow_infinity=False), min_size=1, max_size=300))
    total, cap = data.draw(st.integers(0, 1 << 20)), data.draw(st.none() | st.integers(0, 1000))
    with backends.force(served, "allocate_tokens"), poisoned_memory():
        counts = qts_kernels.allocate_tokens(torch.tensor(weights, dtype=torch.float64), total, cap=cap).tolist()
    assert sum(counts) == (total if cap is None else min(total, cap * len(weights)))
    assert all(0 <= c <= (total if cap is None else cap) for c in counts)
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    for i, j in pairwise(order):
        # A larger weight never has fewer tokens. Equal ones differ by one at most.
        assert counts[i] >= counts[j]
        assert weights[i] != weights[j] or counts[i] <= counts[j] + 1
    if cap is None and sum(map(Fraction, weights)):
        whole = sum(map(Fraction, weights))
        for c, w in zip(counts, weights, strict=True):
            assert abs(c - Fraction(w) * total / whole) < 1 + 1e-6


@NATIVE
@pytest.mark.parametrize("seed", range(20))
def test_native_has_the_bits_of_the_reference(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 700, (8,), generator=generator).tolist()
    weights = torch.randn(sum(lengths), generator=generator, dtype=torch.float64).mul(4).exp()
    weights[torch.rand(len(weights), generator=generator) < 0.2] = 0
    total = torch.randint(0, 20_000, (8,), generator=generator)
    cap = torch.randint(0, 729, (len(weights),), generator=generator, dtype=torch.int32)
    results = []
    for name in ("native", "reference"):
        with backends.force(name, "allocate_tokens"), poisoned_memory():
            results.append(qts_kernels.allocate_tokens(weights, total, cu_seqlens=ragged_cu_seqlens(lengths), cap=cap))
    assert torch.equal(*results)


@NATIVE
def test_threads_share_the_segments():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 700, (60,), generator=generator).tolist()
    weights, total = torch.rand(sum(lengths), generator=generator), torch.full((60,), 5000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with backends.force("native", "allocate_tokens"), poisoned_memory():
                results.append(qts_kernels.allocate_tokens(weights, total, cu_seqlens=ragged_cu_seqlens(lengths)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_segments_do_not_see_one_another(device):
    lengths, totals = [5, 0, 1, 300, 2], [7, 9, 3, 1000, 0]
    weights = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(0)).to(device)
    packed = qts_kernels.allocate_tokens(
        weights,
        torch.tensor(totals, device=device, dtype=torch.int32),
        cu_seqlens=ragged_cu_seqlens(lengths, device),
        cap=90,
    )
    alone = [qts_kernels.allocate_tokens(w, n, cap=90) for w, n in zip(weights.split(lengths), totals, strict=True)]
    assert torch.equal(packed, torch.cat(alone))
    assert [int(part.sum()) for part in packed.split(lengths)] == [7, 0, 3, 1000, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_mean_their_values(device, dtype):
    weights = torch.rand(50, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    assert torch.equal(qts_kernels.allocate_tokens(weights, 999), qts_kernels.allocate_tokens(weights.double(), 999))


def test_ties_zeros_and_caps(device):
    def allocate(weights, total, cap=None):
        cap = torch.tensor(cap, device=device) if isinstance(cap, list) else cap
        return qts_kernels.allocate_tokens(torch.tensor(weights, device=device), total, cap=cap).tolist()

    assert allocate([1.0, 1.0, 1.0], 5) == [2, 2, 1]
    assert allocate([1.0, 3.0], 2) == [1, 1]  # both remainders are a half
    assert allocate([0.0, 0.0, 0.0], 4) == [2, 1, 1]
    assert allocate([0.0, 1.0, 0.0], 4) == [0, 4, 0]
    assert allocate([0.0, 1.0, 0.0], 4, 2) == [1, 2, 1]
    assert allocate([8.0, 1.0, 1.0], 10, 4) == [4, 3, 3]
    assert allocate([8.0, 3.0, 1.0], 12, [2, 4, 99]) == [2, 4, 6]
    assert allocate([1.0, 1e-300], 10, 6) == [6, 4]
    assert allocate([1.0, 2.0], 10, [0, 3]) == [0, 3]
    assert allocate([], 4) == []


def test_flat_weights_lose_nothing():
    """Where int() alone would give out 11,520 of 12,544 tokens in square grids."""
    counts = qts_kernels.allocate_tokens(torch.ones(160), 12_544, cap=729)
    assert sorted(set(counts.tolist())) == [78, 79]
    assert counts.sum() == 12_544


def test_at_most_one_more_than_the_release():
    weights = load_file(GOLDEN)["weights"]
    released = (weights / weights.sum() * 64).int()
    counts = qts_kernels.allocate_tokens(weights, 64)
    assert released.tolist() == [35, 0, 14, 4, 0, 8]
    assert counts.tolist() == [35, 0, 15, 5, 0, 9]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_bad_values_count_as_nothing_on_a_gpu():
    weights = torch.tensor([1.0, float("nan"), -1.0, float("inf"), 1.0], device="cuda")
    assert qts_kernels.allocate_tokens(weights, 4).tolist() == [2, 0, 0, 0, 2]
    total = torch.tensor([-3], device="cuda")
    assert qts_kernels.allocate_tokens(weights, total).tolist() == [0] * 5


def test_opcheck(device):
    weights = torch.rand(9, dtype=torch.float64).to(device)
    args = (weights, ragged_cu_seqlens([4, 5], device), torch.tensor([7, 8], device=device))
    for cap in (None, torch.full((9,), 3, device=device)):
        torch.library.opcheck(torch.ops.qts_kernels.allocate_tokens.default, (*args, cap))


def test_compiles_without_a_graph_break(device):
    weights = torch.linspace(0, 1, 40, device=device)

    def run(weights):
        return qts_kernels.allocate_tokens(weights * 2, 100, cap=9) + 1

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(weights), run(weights))


@pytest.mark.parametrize(
    "error,match,arguments",
    [
        (TypeError, r"weights must be a tensor \[T\], got list", {"weights": [1.0]}),
        (ValueError, r"weights must have shape \[T\], got \[2, 3\]", {"weights": torch.zeros(2, 3)}),
        (TypeError, "weights must be float32 or bfloat16", {"weights": torch.zeros(3, dtype=torch.int64)}),
        (ValueError, "weights must be finite and not negative, got nan", {"weights": torch.tensor([1, float("nan")])}),
        (ValueError, "weights must be finite and not negative, got inf", {"weights": torch.tensor([1, float("inf")])}),
        (ValueError, "weights must be finite and not negative, got -1.0", {"weights": torch.tensor([1.0, -1.0])}),
        (TypeError, "total must be an int or an int tensor, got float", {"total": 1.5}),
        (TypeError, "total must be an int or an int tensor, got bool", {"total": True}),
        (ValueError, "total must not be negative, got -1", {"total": -1}),
        (ValueError, r"total must be below 2\^31, got 2147483648", {"total": 2**31}),
        (ValueError, r"total must be below 2\^31, got 2147483648", {"total": torch.tensor([2**31])}),
        (ValueError, "total must not be negative, got -2", {"total": torch.tensor([-2])}),
        (ValueError, "total must have one entry for each of 1 segments", {"total": torch.tensor([1, 2])}),
        (TypeError, "total must be int64 or int32, got float32", {"total": torch.tensor([1.0])}),
        (TypeError, "cap must be an int or an int tensor, got float", {"cap": 1.5}),
        (ValueError, "cap must not be negative, got -1", {"cap": -1}),
        (ValueError, "cap must not be negative, got -4", {"cap": torch.tensor([1, -4, 1])}),
        (ValueError, r"cap must have shape \[sum T\] = \[3\], got \[2\]", {"cap": torch.tensor([1, 1])}),
        (ValueError, "must end at the number of packed rows, 3, got 2", {"cu_seqlens": ragged_cu_seqlens([1, 1])}),
        (ValueError, r"S >= 1, got \[1\]", {"cu_seqlens": torch.zeros(1, dtype=torch.int32)}),
    ],
)  # fmt: skip
def test_bad_input(error, match, arguments):
    with pytest.raises(error, match=match):
        qts_kernels.allocate_tokens(**{"weights": torch.ones(3), "total": 4, **arguments})
