"""merge_tokens in Triton's interpreter, against the reference in the same dtype and in float64."""

import pytest
import torch

import qts_kernels
from qts_kernels import backends
from qts_kernels.ops.merge_tokens import reference
from qts_kernels.ops.merge_tokens import triton as ours
from qts_kernels.testing import assert_within_budget, poisoned_memory


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(frames, counts, total, sizes=None, compat=False):
    """Matches are those in float64; tokens, sizes and shares are within the budget. The rows."""
    counts = torch.tensor(counts, dtype=torch.int64)
    offsets = torch.nn.functional.pad(counts.clamp(0, frames.shape[1]).cumsum(0), (1, 0)).clamp(max=total).int()
    with poisoned_memory():
        found = ours.merge_tokens(frames, counts, offsets, sizes, total, compat)
    counts = counts.clamp(0, frames.shape[1])
    eager = reference.merge_tokens(frames, counts, offsets, sizes, total, compat)
    wide = None if sizes is None else sizes.double()
    exact = reference.merge_tokens(frames.double(), counts, offsets, wide, total, compat)
    assert torch.equal(found[2], exact[2])
    for i in (0, 1, 3):
        assert found[i].dtype == eager[i].dtype
        assert_within_budget(found[i], eager[i], exact[i])
    return found[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["plain", "sizes", "compat"])
def test_all_counts(dtype, kind):
    """All, most, half, fewer than half, one and none of the tokens; rows behind the last one, and a frame cut there."""
    frames, counts = draw(6, 13, 20, dtype=dtype), [13, 9, 7, 0, 3, 1]
    sizes = draw(6, 13, seed=1).abs() + 0.5 if kind == "sizes" else None
    check(frames, counts, 35, sizes, kind == "compat")
    if kind == "plain":
        check(frames, counts, 31)


def test_several_blocks(monkeypatch):
    monkeypatch.setattr(ours, "MAX_COLUMNS", 32)
    monkeypatch.setattr(ours, "SCAN", 8)
    monkeypatch.setattr(ours, "RANKS", 8)
    tiles = {"EVEN": 16, "ODD": 16, "DEPTH": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(ours, "_match_tiles", lambda *_: tiles)
    check(draw(2, 71, 50), [40, 5], 45)
    check(draw(1, 70, 50, seed=1), [33], 33, compat=True)


def test_ties_go_to_the_lower_position():
    for length, count in ((14, 9), (13, 7), (6, 5)):
        frames, offsets = torch.ones(1, length, 3), torch.tensor([0, count]).int()
        args = (frames, torch.tensor([count]), offsets, None, count)
        for compat in (False, True):
            found, eager = (run.merge_tokens(*args, compat)[2] for run in (ours, reference))
            assert torch.equal(found, eager)


def test_zeros_nan_and_infinities_are_merged_last():
    frames = draw(1, 8, 5).abs()
    frames[0, 0], frames[0, 2, 1], frames[0, 4, 0] = 0, torch.nan, torch.inf
    args = (frames, torch.tensor([6]), torch.tensor([0, 6]).int(), None, 6, False)
    found, eager = (run.merge_tokens(*args) for run in (ours, reference))
    assert torch.equal(found[2], eager[2])
    assert torch.equal(found[0].isnan(), eager[0].isnan())
    frames[:] = torch.nan
    found, eager = (run.merge_tokens(*args)[2] for run in (ours, reference))
    assert torch.equal(found, eager)


def test_nothing_to_merge():
    for shape, counts in (
        ((0, 4, 3), []),
        ((2, 0, 3), [0, 0]),
        ((2, 4, 0), [2, 4]),
        ((1, 1, 3), [1]),
        ((1, 3, 2), [0]),
    ):
        total = sum(counts) + 1
        offsets = torch.tensor([0, *counts]).cumsum(0).int()
        args = (torch.ones(shape), torch.tensor(counts, dtype=torch.int64), offsets, None, total, False)
        for found, eager in zip(ours.merge_tokens(*args), reference.merge_tokens(*args), strict=True):
            assert torch.equal(found, eager)


def test_values_that_only_a_cpu_could_refuse():
    """Counts out of range are clamped; offsets that do not fit them stay in the memory."""
    frames = draw(3, 5, 4)
    check(frames, [-3, 2**40, 2], 7)
    offsets = torch.tensor([0, 2, 9, 9], dtype=torch.int32)
    with poisoned_memory():
        found = ours.merge_tokens(frames, torch.tensor([2, 3, 2]), offsets, None, 9, False)
    assert found[0].isfinite().all()
    assert not found[0][5:].any()


def test_grids_and_gradients():
    frames, sizes = draw(2, 4, 3, 5).requires_grad_(), torch.tensor([(2, 2), (3, 1)])
    results = []
    for served in ("triton", "reference"):
        with backends.force(served, "merge_tokens"):
            tokens, cu_seqlens, merged = qts_kernels.merge_rows_columns(frames, sizes)
            step = qts_kernels.merge_step(frames.flatten(1, 2), 5)[0]
        gradient = torch.autograd.grad(tokens.square().sum() + step.square().sum(), frames)[0]
        results.append((tokens, cu_seqlens, merged, step, gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_float64_is_refused():
    with pytest.raises(TypeError, match=r"frames must be float32 or bfloat16 or float16 in Triton, got torch\.float64"):
        ours.merge_tokens(draw(1, 2, 3).double(), torch.tensor([1]), torch.tensor([0, 1]).int(), None, 1, False)
