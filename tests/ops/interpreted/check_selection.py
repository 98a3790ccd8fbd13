"""topn and gather_rows in Triton's interpreter: the reference's bits."""

import pytest
import torch

from qts_kernels.ops.gather_tokens import reference as gather_reference
from qts_kernels.ops.gather_tokens import triton as gather
from qts_kernels.ops.topn import reference
from qts_kernels.ops.topn import triton as ours
from qts_kernels.testing import poisoned_memory, ragged_cu_seqlens

LENGTHS = [[1], [0], [1300], [100, 0, 1100, 1], [0, 0, 7], [1024, 1023, 1025]]


def draw(kind: str, total: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(total)
    scores = torch.randn(total, generator=generator)
    if kind == "distinct":
        return scores
    if kind == "equal":
        return torch.full((total,), 0.25)
    if kind == "softmax":
        return (scores * 4).softmax(0)
    scores = (scores * 2).round() / 2
    special = torch.tensor([torch.nan, -0.0, 0.0, torch.inf, -torch.inf])
    where = torch.rand(total, generator=generator) < 0.5
    scores[where] = special[torch.randint(5, (int(where.sum()),), generator=generator)]
    return scores


def check(scores, lengths, n, max_n):
    arguments = (scores, ragged_cu_seqlens(lengths), torch.tensor(n), max_n)
    with poisoned_memory():
        found = ours.topn(*arguments)
    for a, b in zip(found, reference.topn(*arguments), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["distinct", "equal", "softmax", "special"])
def test_same_bits_as_the_reference(lengths, kind):
    scores = draw(kind, sum(lengths))
    for share in (0, 0.3, 1, 2):
        n = [int(length * share) + (share == 0.3) for length in lengths]
        check(scores, lengths, n, max(lengths))
    check(scores, lengths, [5] * len(lengths), 3)


def test_keys_that_differ_in_one_digit():
    """Scores whose bits agree in all but the top, middle or low digit of the radix select."""
    for shift in (21, 10, 0):
        bits = torch.tensor(0x3F000000, dtype=torch.int32) + (torch.arange(200, dtype=torch.int32) % 7 << shift)
        check(bits.view(torch.float32), [120, 80], [30, 41], 80)


def test_larger_blocks(monkeypatch):
    monkeypatch.setattr(ours, "block_size", lambda total: 256)
    check(draw("special", 1500), [700, 800], [200, 333], 800)


def test_values_that_only_a_cpu_could_refuse_stay_in_memory():
    """On a GPU nothing reads cu_seqlens, n or indices beforehand: wrong ones must not reach other memory."""
    scores = draw("distinct", 40)
    for offsets in ([0, 50, 60], [0, 30, 20], [-5, 10, 40], [10, 0, 70]):
        found, _ = ours.topn(scores, torch.tensor(offsets, dtype=torch.int32), torch.tensor([-3, 99]), 40)
        assert found.max() < 40


def test_gather():
    generator = torch.Generator().manual_seed(0)
    rows = 50
    wide = torch.randn(60, 8, generator=generator)
    tensors = [
        torch.randn(rows, 3584, generator=generator).bfloat16(),
        torch.randn(rows, 3, generator=generator),
        torch.arange(rows),
        torch.randn(rows, 5, generator=generator).half(),
        torch.rand(rows, 3, generator=generator) > 0.5,
        torch.randn(rows, 4, 6, dtype=torch.complex64, generator=generator),
        torch.randn(rows, 2, dtype=torch.float64, generator=generator),
        torch.randn(rows, 0),
        torch.randn(rows, 20, generator=generator)[:, ::3],
        wide[5:55, 1:4],
    ]
    tensors[0][7, 0] = torch.nan
    for indices in ([3, -1, 0, 49, 7, 7, -1], [], [-1] * 70):
        indices = torch.tensor(indices, dtype=torch.int64)
        with poisoned_memory():
            found = gather.gather_rows(tensors, indices)
        for a, b in zip(found, gather_reference.gather_rows(tensors, indices), strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert (
                torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) if a.is_floating_point() else (a == b).all()
            )


def test_gather_out_of_range_gives_zeros():
    x = torch.ones(5, 3)
    found = gather.gather_rows([x], torch.tensor([5, -2, 4, 2**40]))[0]
    assert found.tolist() == [[0] * 3, [0] * 3, [1] * 3, [0] * 3]


def test_gather_from_nothing():
    found = gather.gather_rows([torch.ones(0, 3)], torch.tensor([-1, -1]))[0]
    assert torch.equal(found, torch.zeros(2, 3))
