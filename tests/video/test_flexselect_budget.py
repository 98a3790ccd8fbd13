"""How FlexSelect shares a budget, and what it keeps of it where newlines count."""

from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qts_video.flexselect.budget import best_of_segments, best_with_newlines, share

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=9)


@given(SIZES, st.integers(0, 200))
def test_shares_are_those_of_the_largest_remainder(sizes, budget):
    shares = share(budget, sizes)
    total = sum(sizes)
    assert sum(shares) == min(budget, total)
    assert all(0 <= part <= size for part, size in zip(shares, sizes, strict=True))
    if total:
        exact = [Fraction(min(budget, total) * size, total) for size in sizes]
        assert all(abs(part - of) < 1 for part, of in zip(shares, exact, strict=True))
        rounded_up = [of - int(of) for part, of in zip(shares, exact, strict=True) if part > of]
        not_up = [of - int(of) for part, of in zip(shares, exact, strict=True) if part <= of]
        assert not rounded_up or not not_up or min(rounded_up) >= max(not_up)


def test_the_first_of_equal_remainders_takes_what_is_left():
    assert share(4, [2, 2, 2]) == [2, 1, 1]
    assert share(7, [5, 5]) == [4, 3]
    assert share(3, [0, 0]) == [0, 0]


def ranked(scores, tokens):
    """NaN last, -0 as 0, the first of equals first."""
    return sorted(tokens, key=lambda t: (scores[t] != scores[t], -scores[t] if scores[t] == scores[t] else 0, t))


SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])


@st.composite
def cases(draw):
    """Videos with newlines of their own spans (0: none), the tokens of each strided over sets, budgets of the sets."""
    videos = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 3)), min_size=1, max_size=3))
    segments, lines, budgets, offsets = [], [], [], [0]
    for span, rows, number in videos:
        start, width = offsets[-1], span or 3
        offsets.append(start + rows * width)
        for k in range(number):
            tokens = [start + i for i in range(rows * width) if i // width % number == k]
            segments.append(tokens)
            lines.append([t - (t - start) % span for t in tokens] if span else None)
            budgets.append(draw(st.integers(0, len(tokens) + (len(tokens) // span if span else 0))))
    scores = draw(st.lists(SCORES, min_size=offsets[-1], max_size=offsets[-1]))
    return segments, lines, budgets, offsets, scores


@settings(deadline=None, max_examples=200)
@given(cases())
def test_what_fits_together_with_its_newlines_is_kept(case):
    segments, lines, budgets, offsets, scores = case
    indices, cu_seqlens = best_with_newlines(
        torch.tensor(scores),
        [torch.tensor(segment, dtype=torch.int64) for segment in segments],
        [None if line is None else torch.tensor(line, dtype=torch.int64) for line in lines],
        budgets,
        torch.tensor(offsets, dtype=torch.int32),
        offsets[-1],
    )
    wanted = []
    for segment, line, budget in zip(segments, lines, budgets, strict=True):
        order, of = ranked(scores, segment), dict(zip(segment, line or [None] * len(segment), strict=True))

        def cost(kept, of=of):
            return len(kept) + len({of[t] for t in kept} - {None})

        fitting = [n for n in range(len(order) + 1) if cost(order[:n]) <= budget]
        kept = order[: max(fitting)]
        more = [t for t in order if t not in kept and cost([*kept, t]) <= budget]
        kept = kept + more[:1]
        assert budget - cost(kept) in (0, 1)
        if cost(kept) < budget:  # short only where another token would cost two
            assert all(cost([*kept, t]) == cost(kept) + 2 for t in segment if t not in kept)
        wanted += kept
    wanted.sort()
    assert indices[: len(wanted)].tolist() == wanted
    assert (indices[len(wanted) :] == -1).all()
    assert cu_seqlens.tolist() == [sum(t < offset for t in wanted) for offset in offsets]


@given(cases())
def test_without_newlines_the_best_of_every_segment_are_kept(case):
    segments, _, budgets, _, scores = case
    counts = [min(budget, len(segment)) for budget, segment in zip(budgets, segments, strict=True)]
    found = best_of_segments(
        torch.tensor(scores), [torch.tensor(segment, dtype=torch.int64) for segment in segments], counts
    )
    wanted = [t for segment, n in zip(segments, counts, strict=True) for t in ranked(scores, segment)[:n]]
    assert found.tolist() == sorted(wanted)


def test_nothing_waits_for_the_device():
    """Host facts alone decide shapes: with tensors that can't be read, both go through."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        segments = [torch.arange(0, 4), torch.arange(4, 10)]
        scores = torch.rand(10)
        assert best_of_segments(scores, segments, [2, 3]).shape == (5,)
        lines = [None, torch.tensor([4, 4, 6, 6, 8, 8])]
        offsets = torch.tensor([0, 10], dtype=torch.int32)
        indices, cu_seqlens = best_with_newlines(scores, segments, lines, [2, 3], offsets, 5)
        assert indices.shape == (5,)
        assert cu_seqlens.shape == (2,)
