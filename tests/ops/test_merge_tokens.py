"""merge_tokens: against matching in plain Python, and the release's own results."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qts_kernels
from qts_kernels import _native, backends
from qts_kernels.testing import assert_within_budget, poisoned_memory

NATIVE = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))
SERVED = ["reference", pytest.param("native", marks=NATIVE)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOLDEN = Path(__file__).parents[1] / "golden" / "quota_a.safetensors"


def draw(shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def clusters(frame, sizes, count):
    """The tokens in each place, as lists of indices, found with lists and fp64."""
    frame, places = frame.double().cpu(), [[i] for i in range(len(frame))]
    while len(places) > count:
        means = []
        for members in places:
            weights = [sizes[i] for i in members]
            mean = sum(w * frame[i] for w, i in zip(weights, members, strict=True)) / sum(weights)
            means.append(mean / mean.norm())
        choices = []
        for a in range(0, len(places), 2):
            similarity, b = max((float(means[a] @ means[b]), -b) for b in range(1, len(places), 2))
            choices.append((-similarity, a, -b))
        for _, a, b in sorted(choices)[: min(len(places) // 2, len(places) - count)]:
            places[b] = places[b] + places[a]
            places[a] = None
        places = [members for members in places if members]
    return [sorted(members) for members in places]


def oracle(frames, counts, sizes=None):
    """tokens, sizes and rows in fp64."""
    tokens, merged, rows = [], [], torch.full(frames.shape[:2], -1)
    for t, (frame, count) in enumerate(zip(frames, counts, strict=True)):
        weight = torch.ones(len(frame)).double() if sizes is None else sizes[t].double().cpu()
        for members in clusters(frame, weight.tolist(), count) if count else []:
            rows[t, members] = len(tokens)
            merged.append(weight[members].sum())
            tokens.append((frame[members].double().cpu() * weight[members, None]).sum(0) / merged[-1])
    return torch.stack(tokens), torch.stack(merged), rows


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_sizes", [False, True])
def test_plain_python(served, dtype, with_sizes):
    frames, counts = draw((7, 23, 37), dtype), torch.tensor([23, 22, 12, 11, 5, 1, 0])
    sizes = torch.rand(7, 23, generator=torch.Generator().manual_seed(1)) * 9 + 0.5 if with_sizes else None
    with backends.force(served), poisoned_memory():
        tokens, cu_seqlens, merged, rows = qts_kernels.merge_tokens(frames, counts, sizes=sizes, with_rows=True)
    exact, exact_sizes, exact_rows = oracle(frames, counts.tolist(), sizes)
    assert torch.equal(rows, exact_rows)
    assert cu_seqlens.tolist() == [0, 23, 45, 57, 68, 73, 74, 74]
    assert tokens.dtype == dtype
    assert_within_budget(tokens, exact.to(dtype), exact)
    torch.testing.assert_close(merged, exact_sizes.float(), rtol=1e-5, atol=0)


def test_on_its_device(device):
    frames, counts = draw((3, 14, 20), device=device), torch.tensor([9, 0, 4], device=device)
    with poisoned_memory():
        tokens, _, _, rows = qts_kernels.merge_tokens(frames, counts, with_rows=True)
    exact, _, exact_rows = oracle(frames, counts.tolist())
    assert torch.equal(rows.cpu(), exact_rows)
    torch.testing.assert_close(tokens.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("served", SERVED)
def test_golden_step(served):
    held = load_file(GOLDEN)
    with backends.force(served):
        tokens, sizes = qts_kernels.merge_step(held["tome.x"], 11, compat=True)
        ordered, ordered_sizes = qts_kernels.merge_step(held["tome.x"], 11)
    torch.testing.assert_close(tokens, held["tome.merged"], rtol=0, atol=2e-6)
    assert torch.equal(sizes, held["tome.size"][..., 0])
    # Ours are the same tokens in another order.
    distance = torch.cdist(ordered, tokens, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.amin(2).max() < 1e-5
    assert torch.equal(ordered_sizes.sort().values, sizes.sort().values)


@pytest.mark.parametrize("served", SERVED)
def test_golden_rounds(served):
    """The release's v4 (all tokens of a frame) and v5 (rows, then columns)."""
    held = load_file(GOLDEN)
    frames = held["x"][[0, 2, 3, 5]]
    with backends.force(served):
        counts = torch.tensor([len(held[f"v4.{i}"]) for i in range(4)])
        tokens, _, _ = qts_kernels.merge_tokens(frames, counts, compat=True)
        ours, _, sizes = qts_kernels.merge_tokens(frames, counts)
        grids = torch.tensor([held[f"v5.{i}"].shape[:2] for i in range(4)])
        grid_tokens, cu_seqlens, _ = qts_kernels.merge_rows_columns(frames.view(4, 9, 9, 16), grids, compat=True)
    torch.testing.assert_close(tokens, torch.cat([held[f"v4.{i}"] for i in range(4)]), rtol=0, atol=2e-6)
    expected = torch.cat([held[f"v5.{i}"].reshape(-1, 16) for i in range(4)])
    torch.testing.assert_close(grid_tokens, expected, rtol=0, atol=2e-6)
    assert cu_seqlens.tolist() == [0, 30, 42, 46, 52]
    # What the release loses: with sizes, the weighted sum of the tokens is the frame's.
    for frame, token, size in zip(frames, ours.split(counts.tolist()), sizes.split(counts.tolist()), strict=True):
        torch.testing.assert_close((token * size[:, None]).sum(0), frame.sum(0), rtol=1e-4, atol=1e-4)


def test_rows_and_columns_one_at_a_time(device):
    """Against merge_tokens of each row, then of each column."""
    frames, sizes = draw((4, 6, 7, 9), device=device), torch.tensor([(3, 4), (6, 7), (0, 5), (5, 1)])
    with poisoned_memory():
        tokens, cu_seqlens, merged = qts_kernels.merge_rows_columns(frames, sizes)
    assert cu_seqlens.tolist() == [0, 12, 54, 54, 59]
    for t, (height, width) in enumerate(sizes.tolist()):
        if height == 0:
            continue
        rows, _, row_sizes = qts_kernels.merge_tokens(frames[t], torch.full((6,), width))
        columns = rows.view(6, width, 9).transpose(0, 1)
        want, _, want_sizes = qts_kernels.merge_tokens(
            columns, torch.full((width,), height), sizes=row_sizes.view(6, width).t()
        )
        part = slice(*cu_seqlens[t : t + 2].tolist())
        assert torch.equal(tokens[part].view(height, width, 9), want.view(width, height, 9).transpose(0, 1))
        assert torch.equal(merged[part].view(height, width), want_sizes.view(width, height).t())
        assert merged[part].sum() == 42


@pytest.mark.parametrize("served", SERVED)
def test_ties_go_to_the_lower_position(served):
    with backends.force(served):
        _, _, _, rows = qts_kernels.merge_tokens(torch.ones(1, 41, 700), torch.tensor([21]), with_rows=True)
        # All even tokens but the last, which is the largest tie, go to the first odd one.
        assert rows[0].tolist() == [0 if i == 1 or (i % 2 == 0 and i < 40) else (i - 1) // 2 for i in range(40)] + [20]
        _, _, _, rows = qts_kernels.merge_tokens(torch.ones(1, 6, 3), torch.tensor([5]), with_rows=True)
        assert rows[0].tolist() == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("served", SERVED)
def test_zeros_nan_and_infinities_are_merged_last(served):
    frames = draw((1, 8, 5)).abs()
    frames[0, 0], frames[0, 2, 1], frames[0, 4, 0] = 0, torch.nan, torch.inf
    with backends.force(served):
        tokens, _, _, rows = qts_kernels.merge_tokens(frames, torch.tensor([6]), with_rows=True)
    assert rows[0, 6] in (rows[0, 1], rows[0, 3], rows[0, 5], rows[0, 7])
    assert rows[0, 0] == rows[0, 1]  # similarity 0, to the first
    assert tokens[rows[0, 2], 1].isnan()


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_at_a_real_shape(dtype):
    """Tokens with a few directions in common, as real ones have, so that similarities are apart."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(2, 40, 1030, generator=generator)
    frames = (torch.randn(2, 225, 40, generator=generator) @ base / 6).to(dtype)
    counts = torch.tensor([30, 101])
    results = {}
    for name in ("native", "reference"):
        with backends.force(name), poisoned_memory():
            results[name] = qts_kernels.merge_tokens(frames, counts, with_rows=True)
    assert torch.equal(results["native"][3], results["reference"][3])
    exact = qts_kernels.merge_tokens(frames.double(), counts, with_rows=True)
    assert torch.equal(results["native"][3], exact[3])
    assert_within_budget(results["native"][0], results["reference"][0], exact[0])


@NATIVE
def test_threads_do_not_change_a_bit():
    before, results, frames = torch.get_num_threads(), [], draw((5, 60, 300))
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(qts_kernels.merge_tokens(frames, torch.tensor([7, 60, 29, 1, 30])))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("served", SERVED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_counts(served, data):
    """Every token goes to one row of its own frame, all rows are taken, and sizes and weighted sums add up."""
    length, compat = data.draw(st.integers(1, 30)), data.draw(st.booleans())
    counts = data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4))
    frames = draw((len(counts), length, 5), seed=length)
    with backends.force(served), poisoned_memory():
        tokens, cu_seqlens, sizes, rows = qts_kernels.merge_tokens(
            frames, torch.tensor(counts), compat=compat, with_rows=True
        )
    assert cu_seqlens.diff().tolist() == counts
    for t, count in enumerate(counts):
        start = int(cu_seqlens[t])
        assert sorted(set(rows[t].tolist())) == (list(range(start, start + count)) if count else [-1])
        assert sizes[start : start + count].tolist() == [float((rows[t] == start + k).sum()) for k in range(count)]
        part = tokens[start : start + count]
        if count and not compat:
            torch.testing.assert_close(
                (part * sizes[start : start + count, None]).sum(0), frames[t].sum(0), rtol=1e-4, atol=1e-4
            )
        if count == length:
            assert torch.equal(part, frames[t])


def test_zeros_up_to_max_tokens(device):
    frames, counts = draw((3, 8, 6), device=device), torch.tensor([3, 0, 8], dtype=torch.int32, device=device)
    with poisoned_memory():
        tokens, _, sizes = qts_kernels.merge_tokens(frames, counts, max_tokens=15)
    exact, _, exact_sizes = qts_kernels.merge_tokens(frames, counts.cpu())
    assert tokens.shape == (15, 6)
    assert torch.equal(tokens[:11], exact)
    assert torch.equal(sizes[:11], exact_sizes)
    assert not tokens[11:].any()
    assert not sizes[11:].any()


def test_nothing_to_merge(device):
    for shape, counts in (((0, 4, 3), []), ((2, 0, 3), [0, 0]), ((2, 4, 0), [2, 4]), ((1, 1, 3), [1])):
        frames = torch.ones(shape, device=device).requires_grad_()
        tokens, cu_seqlens, sizes = qts_kernels.merge_tokens(frames, torch.tensor(counts, dtype=torch.int64))
        assert tokens.shape == (sum(counts), shape[2])
        assert cu_seqlens.shape == (len(counts) + 1,)
        assert sizes.sum() == sum(shape[1] for count in counts if count)
        tokens.sum().backward()
        assert frames.grad.shape == shape
    tokens, sizes = qts_kernels.merge_step(torch.ones(2, 1, 3, device=device), 0)
    assert tokens.shape == (2, 1, 3)
    tokens, cu_seqlens, _ = qts_kernels.merge_rows_columns(
        torch.ones(2, 3, 4, 5, device=device), torch.zeros(2, 2).int()
    )
    assert tokens.shape == (0, 5)


def test_layouts_that_are_not_contiguous(device):
    base = draw((6, 9, 20), device=device)
    for x in (base[::2], base.transpose(1, 2)[:3], base[:3, :, ::2], base[:1].expand(3, -1, -1)):
        for a, b in zip(
            *(qts_kernels.merge_tokens(y, torch.tensor([4, 2, 9])) for y in (x, x.contiguous())), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("compat", [False, True])
def test_gradcheck(device, compat):
    frames = draw((3, 7, 4), torch.float64, device).requires_grad_()
    sizes = None if compat else torch.rand(3, 7, dtype=torch.float64).to(device) + 0.5
    counts = torch.tensor([7, 2, 0])

    def run(x):
        return qts_kernels.merge_tokens(x, counts, sizes=sizes, compat=compat)[0]

    assert torch.autograd.gradcheck(run, frames)
    assert torch.autograd.gradgradcheck(lambda x: run(x) ** 2, frames)
    grid = draw((2, 3, 4, 2), torch.float64, device).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: qts_kernels.merge_rows_columns(x, torch.tensor([(2, 3), (1, 1)]), compat=compat)[0], grid
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_weight_in_the_mean(device, dtype):
    frames, counts = draw((2, 11, 6), dtype, device).requires_grad_(), torch.tensor([3, 6])
    sizes = torch.rand(2, 11).to(device) + 0.5
    tokens, _, merged, rows = qts_kernels.merge_tokens(frames, counts, sizes=sizes, with_rows=True)
    grad = draw(tokens.shape, dtype, device, 1)
    tokens.backward(grad)
    exact = grad.double()[rows] * (sizes.double() / merged.double()[rows])[..., None]
    assert_within_budget(frames.grad, exact.to(dtype), exact)


def test_opcheck(device):
    frames = draw((2, 6, 3), device=device).requires_grad_()
    args = (frames, torch.tensor([4, 1], device=device), torch.tensor([0, 4, 5], device=device).int())
    for sizes, compat in ((None, False), (torch.full((2, 6), 2.0, device=device), False), (None, True)):
        torch.library.opcheck(torch.ops.qts_kernels.merge_tokens.default, (*args, sizes, 7, compat))


def test_compiles_without_a_graph_break(device):
    frames = draw((2, 6, 3), device=device).requires_grad_()
    counts = torch.tensor([4, 1], device=device)

    def run(frames, counts):
        return qts_kernels.merge_tokens(frames * 2, counts, max_tokens=6)[0] + qts_kernels.merge_step(frames, 3)[
            0
        ].view(6, 3)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(frames, counts), run(frames, counts))
    gradients = [torch.autograd.grad(f(frames, counts).square().sum(), frames)[0] for f in (compiled, run)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "error,match,arguments",
    [
        (TypeError, r"frames must be a tensor \[T, N, D\], got list", {"frames": [1.0]}),
        (ValueError, r"frames must have shape \[T, N, D\], got \[2, 3\]", {"frames": torch.zeros(2, 3)}),
        (TypeError, "counts must be int64 or int32, got float32", {"counts": torch.ones(2)}),
        (ValueError, r"counts must have shape \[T\] = \[2\], got \[3\]", {"counts": torch.ones(3).int()}),
        (ValueError, r"counts must be in \[0, 5\], got 6", {"counts": torch.tensor([1, 6]), "max_tokens": 9}),
        (ValueError, r"counts must be in \[0, 5\], got -1", {"counts": torch.tensor([1, -1])}),
        (ValueError, "max_tokens must not be negative, got -1", {"max_tokens": -1}),
        (ValueError, "max_tokens must hold the 3 tokens of counts, got 2", {"max_tokens": 2}),
        (TypeError, "sizes must be float32, got float64", {"sizes": torch.ones(2, 5).double()}),
        (ValueError, r"sizes must have shape \[T, N\] = \[2, 5\], got \[2, 4\]", {"sizes": torch.ones(2, 4)}),
        (ValueError, "sizes must be finite and above 0, got 0.0", {"sizes": torch.zeros(2, 5)}),
        (ValueError, "sizes must be None where compat is True", {"sizes": torch.ones(2, 5), "compat": True}),
    ],
)
def test_bad_input(error, match, arguments):
    with pytest.raises(error, match=match):
        qts_kernels.merge_tokens(**{"frames": torch.zeros(2, 5, 3), "counts": torch.tensor([1, 2]), **arguments})


def test_bad_steps_and_grids():
    frames, grid = torch.zeros(2, 5, 3), torch.zeros(2, 3, 4, 5)
    with pytest.raises(ValueError, match=r"r must be in \[0, N // 2\] = \[0, 2\], got 3"):
        qts_kernels.merge_step(frames, 3)
    with pytest.raises(TypeError, match="r must be an int, got float"):
        qts_kernels.merge_step(frames, 1.0)
    with pytest.raises(ValueError, match=r"sizes must have columns in \[0, 4\], got \[1, 5\]"):
        qts_kernels.merge_rows_columns(grid, torch.tensor([(1, 1), (1, 5)]))
    with pytest.raises(ValueError, match=r"sizes must have rows in \[0, 3\], got \[1, -1\]"):
        qts_kernels.merge_rows_columns(grid, torch.tensor([(1, 1), (-1, 4)]))
    with pytest.raises(ValueError, match=r"frames must have shape \[T, h, w, D\]"):
        qts_kernels.merge_rows_columns(frames, torch.ones(2, 2).int())
