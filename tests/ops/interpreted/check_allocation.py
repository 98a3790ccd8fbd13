"""allocate_tokens in Triton's interpreter: the reference's bits."""

import pytest
import torch

from qts_kernels.ops.allocate_tokens import reference
from qts_kernels.ops.allocate_tokens import triton as ours
from qts_kernels.testing import poisoned_memory, ragged_cu_seqlens


def check(weights, lengths, total, cap):
    arguments = (weights.double(), ragged_cu_seqlens(lengths), torch.tensor(total), cap)
    with poisoned_memory():
        found = ours.allocate_tokens(*arguments)
    expected = reference.allocate_tokens(*arguments)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["wide", "zeros", "integers"])
def test_same_bits_as_the_reference(monkeypatch, kind):
    """Two blocks for the longest segment; more than 256 entries only here, where weights lose a bit."""
    monkeypatch.setattr(ours, "MAX_BLOCK", 256)
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 0, 33, 300]
    count = sum(lengths)
    weights = {
        "wide": torch.randn(count, generator=generator, dtype=torch.float64).mul(9).exp(),
        "zeros": (torch.rand(count, generator=generator) < 0.05) * torch.rand(count, generator=generator),
        "integers": torch.randint(0, 4, (count,), generator=generator).double(),
    }[kind]
    check(weights, lengths, [3, 7, 500, 12544], torch.randint(0, 90, (count,), generator=generator))
    check(weights, lengths, [0, 0, 17, 2**31 - 1], None)


def test_values_that_only_a_cpu_could_refuse():
    weights = torch.tensor([1.0, torch.nan, -1.0, torch.inf, 2.0, 5e-324, -0.0], dtype=torch.float64)
    check(weights, [7], [2**40], torch.tensor([4, -7, 3, 3, 3, 3, 3]))
    check(weights, [7], [-5], None)
    for offsets in ([0, 9, 12], [0, 5, 3], [-5, 3, 7], [3, 0, 7]):
        counts = ours.allocate_tokens(weights, torch.tensor(offsets, dtype=torch.int32), torch.tensor([4, 5]), None)
        assert counts.min() >= 0
