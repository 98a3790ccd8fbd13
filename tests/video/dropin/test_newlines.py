"""Newline tokens: where they are, which of them stay, and what they cost. By plain Python that walks the tokens."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qts_video.dropin.checks import check_selection
from qts_video.dropin.layout import locate_videos
from qts_video.dropin.newlines import kept_newlines
from qts_video.dropin.prefill import offsets
from qts_video.dropin.shorten import kept_columns
from qts_video.methods import Random, Uniform
from qts_video.methods.base import Videos, resolve_budget
from tiny import VIDEO
from tiny_llava import POSITIONS, cost, span_of, walk

from qts_kernels import Selection

TEXT_ID = 7

grids = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
several = st.lists(st.tuples(grids, st.sampled_from(POSITIONS)), min_size=1, max_size=4)


@st.composite
def batches(draw):
    """Samples with videos of any grids and layouts, padded on a side: the prompt, and what every column of it is."""
    samples = draw(st.lists(several, min_size=1, max_size=3))
    left = draw(st.booleans())
    contents = []
    for number, videos in enumerate(samples):
        content = ["text"]
        for of_sample, (grid, position) in enumerate(videos):
            content += [((number, of_sample), token) for token in walk(grid, position)]
            content += ["text"] * draw(st.integers(0, 2))
        contents.append(content)
    longest = max(map(len, contents))
    padding = [["pad"] * (longest - len(content)) for content in contents]
    contents = [pad + of if left else of + pad for pad, of in zip(padding, contents, strict=True)]
    return samples, contents


def locate(samples, contents):
    ids = torch.tensor([[VIDEO if isinstance(what, tuple) else TEXT_ID for what in row] for row in contents])
    valid = torch.tensor([[what != "pad" for what in row] for row in contents])
    videos = [video for of in samples for video in of]
    return locate_videos(
        ids, valid, VIDEO, [grid for grid, _ in videos], newline_spans=[span_of(*video) for video in videos]
    )


def is_newline(what):
    return isinstance(what, tuple) and isinstance(what[1], frozenset)


@settings(max_examples=150, deadline=None)
@given(batches())
def test_tokens_and_newlines_are_where_the_layout_says(batch):
    samples, contents = batch
    layout = locate(samples, contents)
    length = len(contents[0])
    flat = [what for row in contents for what in row]
    tokens = [i for i, what in enumerate(flat) if isinstance(what, tuple) and not is_newline(what)]
    assert layout.rows.tolist() == tokens
    assert layout.newline_rows.tolist() == [i for i, what in enumerate(flat) if is_newline(what)]
    names = [(sample, video) for sample, of in enumerate(samples) for video in range(len(of))]
    assert layout.sample == [sample for sample, _ in names]
    for name, newlines, spans in zip(names, layout.newlines, layout.frame_spans, strict=True):
        assert newlines == sum(is_newline(what) and what[0] == name for what in flat)
        for frame, (start, stop) in enumerate(spans.tolist()):
            held = [what[1] for what in contents[name[0]][start:stop]]
            assert {what[0] for what in held if isinstance(what, tuple)} == {frame}
            assert all(max(what)[0] == frame for what in held if isinstance(what, frozenset))
        assert spans[:, 1].diff().min() > 0 if len(spans) > 1 else True
        assert int(spans[-1, 1] - spans[0, 0]) == sum(
            isinstance(what, tuple) and what[0] == name for what in contents[name[0]]
        )
    assert layout.columns == length


@settings(max_examples=200, deadline=None)
@given(batches(), st.data())
def test_a_newline_stays_with_its_tokens(batch, data):
    samples, contents = batch
    layout = locate(samples, contents)
    flat = [what for row in contents for what in row]
    tokens = [what for what in flat if isinstance(what, tuple) and not is_newline(what)]
    share = data.draw(st.sampled_from((0.05, 0.3, 0.9)))
    draw = torch.rand(len(tokens), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    chosen = [int(i) for i in (draw < share).nonzero()] or [len(tokens) - 1]
    tail = data.draw(st.integers(0, 2))

    names = [(sample, video) for sample, of in enumerate(samples) for video in range(len(of))]
    whole = {
        name: span_of(*video) == layout.lengths[i]
        for i, (name, video) in enumerate(zip(names, (v for of in samples for v in of), strict=True))
    }
    kept = {tokens[i] for i in chosen}

    def stays(what):
        if not is_newline(what):
            return what == "text" or what in kept
        return whole[what[0]] or any((what[0], token) in kept for token in what[1])

    cu_seqlens = offsets(layout.lengths, torch.device("cpu"))
    indices = torch.tensor(chosen + [-1] * tail)
    newlines, counts = kept_newlines(layout, indices, cu_seqlens)
    assert newlines.tolist() == [stays(what) for what in flat if is_newline(what)]
    assert counts.tolist() == [
        sum(is_newline(what) and what[0] == name and stays(what) for what in flat) for name in names
    ]

    selection = Selection(
        indices=indices,
        cu_seqlens=offsets([sum(tokens[i][0] == name for i in chosen) for name in names], torch.device("cpu")),
    )
    videos = Videos(
        torch.zeros(len(tokens), 2), cu_seqlens, layout.lengths, layout.grids, torch.zeros(len(tokens)), layout.sample
    )
    columns = kept_columns(layout, check_selection(selection, videos, layout, "test"))
    for row, source in zip(contents, columns.source.tolist(), strict=True):
        assert [column for column in source if column >= 0] == [i for i, what in enumerate(row) if stays(what)]
    placed = columns.source.flatten()[columns.kept_rows]
    assert placed.tolist() == [int(layout.rows[i]) % layout.columns for i in chosen]


# Budgets


def videos_of(*videos):
    lengths = [grid[0] * grid[1] * grid[2] for grid, _ in videos]
    total = sum(lengths)
    return Videos(
        torch.zeros(total, 2),
        offsets(lengths, torch.device("cpu")),
        lengths,
        [grid for grid, _ in videos],
        torch.zeros(total),
        [0] * len(videos),
        newline_spans=[span_of(*video) for video in videos],
    )


def chosen_of(method, packed):
    """Of each video, the tokens that ``method`` keeps, by their number in it."""
    selection = method.select(packed)
    bounds, starts = selection.cu_seqlens.tolist(), packed.cu_seqlens.tolist()
    assert selection.n.tolist() == selection.cu_seqlens.diff().tolist()
    return [
        [int(i) - start for i in selection.indices[a:b]]
        for (a, b), start in zip(pairwise(bounds), starts[:-1], strict=True)
    ]


budgets = st.tuples(st.none() | st.floats(0.01, 1), st.none() | st.integers(1, 90))  # (retention_ratio, max_tokens)


@settings(max_examples=150, deadline=None)
@given(several, budgets)
def test_uniform_keeps_as_many_as_fit_with_their_newlines(videos, budget):
    packed = videos_of(*videos)
    for (grid, position), length, kept in zip(videos, packed.lengths, chosen_of(Uniform(*budget), packed), strict=True):
        evenly = [[(2 * i + 1) * length // (2 * k) for i in range(k)] for k in range(1, length + 1)]
        bound = resolve_budget(len(walk(grid, position)), *budget)
        fitting = [tokens for tokens in evenly if cost(grid, position, tokens) <= bound]
        assert kept == (fitting[-1] if fitting else evenly[0])


@settings(max_examples=150, deadline=None)
@given(several, budgets, st.integers(0, 5))
def test_random_keeps_the_longest_start_of_its_order_that_fits(videos, budget, seed):
    packed = videos_of(*videos)
    for (grid, position), length, kept in zip(
        videos, packed.lengths, chosen_of(Random(*budget, seed=seed), packed), strict=True
    ):
        plain = videos_of((grid, "no_token"))
        starts = [set(chosen_of(Random(max_tokens=k, seed=seed), plain)[0]) for k in range(1, length + 1)]
        bound = resolve_budget(len(walk(grid, position)), *budget)
        fitting = [tokens for tokens in starts if cost(grid, position, tokens) <= bound]
        assert kept == sorted(fitting[-1] if fitting else starts[0])


@pytest.mark.parametrize("method", [Uniform, Random])
def test_without_newlines_budgets_are_of_tokens_alone(method):
    plain = videos_of(((4, 3, 2), "no_token"), ((1, 1, 1), "no_token"), ((5, 7, 3), "no_token"))
    unsaid = videos_of(((4, 3, 2), "no_token"), ((1, 1, 1), "no_token"), ((5, 7, 3), "no_token"))
    unsaid.newline_spans = []
    for budget in ((None, None), (0.3, None), (None, 5), (0.5, 20)):
        kept = chosen_of(method(*budget), plain)
        assert kept == chosen_of(method(*budget), unsaid)
        assert [len(tokens) for tokens in kept] == [resolve_budget(length, *budget) for length in (24, 1, 105)]


@pytest.mark.parametrize("method", [Uniform, Random])
@pytest.mark.parametrize("position", POSITIONS)
def test_no_bound_keeps_everything_and_the_least_keeps_a_token(method, position):
    packed = videos_of(((3, 4, 5), position), ((1, 1, 1), position))
    for everything in (method(), method(1.0), method(max_tokens=1000)):
        assert [len(tokens) for tokens in chosen_of(everything, packed)] == [60, 1]
    for least in (method(max_tokens=1), method(1e-6)):
        assert [len(tokens) for tokens in chosen_of(least, packed)] == [1, 1]
