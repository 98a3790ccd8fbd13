"""resize_frames in Triton's interpreter, against the reference in the same dtype and in float64."""

import pytest
import torch

from qts_kernels.ops.resize_frames import reference
from qts_kernels.ops.resize_frames import triton as ours
from qts_kernels.testing import assert_within_budget, poisoned_memory

MODES = ["bilinear", "adaptive_avg", "linspace"]


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(sizes, rows):
    counts = sizes.clamp(min=0).prod(1).cumsum(0).clamp(max=rows)
    return torch.cat([torch.zeros(1, dtype=torch.int32), counts.int()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("height,width,dtype", [(3, 4, torch.bfloat16), (1, 1, torch.float32)])
def test_forward_and_backward(mode, dtype, height, width):
    """An empty, a smaller and a larger grid; with rows behind the last token, and with the last grid cut."""
    sizes = torch.tensor([(0, 3), (2, 3), (4, 5)])
    frames = draw(3, height, width, 40, dtype=dtype)
    for rows in (28, 20):
        cu = offsets(sizes, rows)
        with poisoned_memory():
            found = ours.resize_frames(frames, sizes, cu, rows, mode)
        eager, exact = (reference.resize_frames(x, sizes, cu, rows, mode) for x in (frames, frames.double()))
        if mode == "linspace":
            assert torch.equal(found, eager)
        assert_within_budget(found, eager, exact)
        grad = draw(rows, 40, dtype=dtype, seed=1)
        arguments = (sizes, cu, height, width, mode)
        with poisoned_memory():
            found = ours.resize_frames_backward(grad, *arguments)
        assert_within_budget(
            found,
            reference.resize_frames_backward(grad, *arguments),
            reference.resize_frames_backward(grad.double(), *arguments),
        )


def test_linspace_indices():
    for tokens in (25, 81):
        frames = torch.arange(tokens).view(1, tokens, 1, 1).float()
        for n in (1, 2, 25, 41):
            found = ours.resize_frames(frames, torch.tensor([[n, 1]]), torch.tensor([0, n]).int(), n, "linspace")
            assert torch.equal(found[:, 0].long(), torch.linspace(0, tokens - 1, n).long())


@pytest.mark.parametrize("mode", MODES)
def test_several_blocks_of_columns(monkeypatch, mode):
    monkeypatch.setattr(ours, "MAX_BLOCK", 32)
    sizes = torch.tensor([(2, 2), (3, 1)], dtype=torch.int32)
    frames = draw(2, 3, 3, 70)
    cu = offsets(sizes, 7)
    eager, exact = (reference.resize_frames(x, sizes, cu, 7, mode) for x in (frames, frames.double()))
    assert_within_budget(ours.resize_frames(frames, sizes, cu, 7, mode), eager, exact)


@pytest.mark.parametrize("mode", MODES)
def test_values_that_only_a_cpu_could_refuse(mode):
    """Negative sizes have no tokens; a grid too large for the rows is cut."""
    sizes = torch.tensor([(3, -2), (2**40, 1), (2, 2)])
    frames = draw(3, 2, 2, 4)
    cu = torch.tensor([0, 0, 9, 9], dtype=torch.int32)
    assert ours.resize_frames(frames, sizes, cu, 9, mode).isfinite().all()
    found = ours.resize_frames_backward(torch.ones(9, 4), sizes, cu, 1, 1, mode)
    assert found[:, 0, 0, 0].tolist() == [0, 9, 0]
