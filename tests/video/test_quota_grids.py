"""QuoTA on hand-made videos: every count against plain arithmetic, every token against torch's own resampling."""

from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from qts_video.methods import QuoTA, Videos
from qts_video.quota.frame_scores import FrameRelevance
from qts_video.quota.grids import grid_ladder, group_places

import qts_kernels

KINDS = ("none", "row", "frame", "video")
WIDTH = 5


def make_videos(grids, sample, kind="none", question=False):
    lengths = [t * h * w for t, h, w in grids]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    spans = {
        "none": [0] * len(grids),
        "row": [w for _, _, w in grids],
        "frame": [h * w for _, h, w in grids],
        "video": lengths,
    }[kind]
    generator = torch.Generator().manual_seed(0)
    videos = Videos(
        tokens=torch.randn(sum(lengths), WIDTH, generator=generator, dtype=torch.float64),
        cu_seqlens=offsets,
        lengths=lengths,
        grids=grids,
        timestamps=torch.zeros(sum(lengths)),
        sample=sample,
        newline_spans=spans,
    )
    if question:
        videos.question_ids = [torch.arange(2 + s) for s in sample]
        rows = [torch.randn(9, WIDTH, generator=generator, dtype=torch.float64) for _ in set(sample)]
        videos.question = torch.cat([rows[s][: 2 + s] for s in sample])
        videos.cu_seqlens_question = torch.tensor([0, *(2 + s for s in sample)]).cumsum(0).to(torch.int32)
    return videos


def ladder(h, w):
    """By the definition, in fractions."""
    grids = [(0, 0), (1, 1)]
    while grids[-1] != (h, w):
        a, b = grids[-1]
        nexts = [(a, b + 1), (a + 1, b)]  # a column first
        nexts = [(a, b) for a, b in nexts if a <= h and b <= w]
        grids.append(min(nexts, key=lambda size: abs(Fraction(size[0], h) - Fraction(size[1], w))))
    return grids


def allocate(weights, total, caps):
    """Largest remainder with caps, in fractions."""
    counts, sharing = [0] * len(weights), set(range(len(weights)))
    left = min(total, sum(caps))
    while sharing:
        zero = all(weights[i] == 0 for i in sharing)
        whole = len(sharing) if zero else sum(Fraction(weights[i]) for i in sharing)
        due = {i: left * (1 if zero else Fraction(weights[i])) / whole for i in sharing}
        bound = {i for i in sharing if due[i] >= caps[i]}
        if not bound:
            for i in sharing:
                counts[i] = int(due[i])
            rest = left - sum(int(due[i]) for i in sharing)
            for i in sorted(sharing, key=lambda i: (int(due[i]) - due[i], i))[:rest]:
                counts[i] += 1
            break
        for i in bound:
            counts[i] = caps[i]
            left -= caps[i]
        sharing -= bound
    return counts


def grids_of(shares, weights, costs):
    """What each frame's share pays for, and the rest handed on, one step at a time, looked for anew every time."""
    steps = [max(i for i, cost in enumerate(of) if cost <= share) for share, of in zip(shares, costs, strict=True)]
    while True:
        left = sum(shares) - sum(of[step] for step, of in zip(steps, costs, strict=True))
        fits = [i for i, s in enumerate(steps) if s + 1 < len(costs[i]) and costs[i][s + 1] - costs[i][s] <= left]
        if not fits:
            return steps, left
        best = min(fits, key=lambda i: (weights[i] == 0, costs[i][steps[i]] - shares[i], i))
        steps[best] += 1


@st.composite
def cases(draw):
    samples = draw(st.lists(st.integers(1, 2), min_size=1, max_size=3))
    sample = [s for s, videos in enumerate(samples) for _ in range(videos)]
    side = st.integers(1, 6)
    grids = [(draw(st.integers(1, 4)), draw(side), draw(side)) for _ in sample]
    steps = sum(t for t, _, _ in grids)
    # Powers of two: all that is computed of them is exact.
    scores = draw(st.lists(st.sampled_from([0.0, 0.125, 0.5, 1.0, 4.0]), min_size=steps, max_size=steps))
    return grids, sample, scores, draw(st.sampled_from(KINDS)), draw(st.integers(1, 90)), draw(st.booleans())


def newlines_of(kept, videos):
    """How many newlines of each video stay, by the rows that are kept."""
    stay, start = [], 0
    for length, span in zip(videos.lengths, videos.newline_spans, strict=True):
        of_video = [row - start for row in kept if start <= row < start + length]
        stay.append(1 if span == length else len({row // span for row in of_video}) if span else 0)
        start += length
    return stay


@settings(max_examples=120, deadline=None)
@given(cases())
def test_counts_grids_and_tokens(case):
    grids, sample, scores, kind, budget, count_newlines = case
    videos = make_videos(grids, sample, kind)
    selection = QuoTA(scores, total_tokens=budget, include_newlines=count_newlines).select(videos)
    shares, sizes, unused = selection.extras
    frame = 0
    kept, tokens, counts = [], [], []
    starts = torch.tensor([0, *videos.lengths]).cumsum(0).tolist()
    for s in sorted(set(sample)):
        members = [v for v, of in enumerate(sample) if of == s]
        shapes = [(h, w) for v in members for _ in range(grids[v][0]) for h, w in [grids[v][1:]]]
        # Where two layouts are the same, the newline is the whole video's, which always stays.
        kinds = [
            "none" if not count_newlines or videos.newline_spans[v] == videos.lengths[v] else kind
            for v in members
            for _ in range(grids[v][0])
        ]
        costs = [
            [a * b + {"none": 0, "row": a, "frame": min(a * b, 1)}[k] for a, b in ladder(h, w)]
            for (h, w), k in zip(shapes, kinds, strict=True)
        ]
        paid = sum(count_newlines and videos.newline_spans[v] == videos.lengths[v] for v in members)
        given_to_frames = max(budget - paid, min(of[1] for of in costs))
        mine = scores[frame : frame + len(shapes)]
        weights = [Fraction(x) ** 2 for x in mine]
        wanted = allocate(weights, given_to_frames, [of[-1] for of in costs])
        whole = sum(of[-1] for of in costs)
        assert sum(wanted) == min(given_to_frames, whole)
        steps, left = grids_of(wanted, weights, costs)
        wanted_sizes = [ladder(h, w)[step] for (h, w), step in zip(shapes, steps, strict=True)]
        assert shares[frame : frame + len(shapes)].tolist() == wanted
        assert [tuple(size) for size in sizes[frame : frame + len(shapes)].tolist()] == wanted_sizes
        assert int(unused[s]) == left
        start = starts[members[0]]
        mine_kept = []
        for (h, w), (a, b) in zip(shapes, wanted_sizes, strict=True):
            places = [start + int((i + 0.5) * h / a) * w + int((j + 0.5) * w / b) for i in range(a) for j in range(b)]
            assert len(set(places)) == a * b
            mine_kept += places
            if a:
                picture = videos.tokens[start : start + h * w].view(1, h, w, -1).permute(0, 3, 1, 2)
                resized = F.interpolate(picture, size=(a, b), mode="bilinear", align_corners=False)
                tokens.append(resized[0].permute(1, 2, 0).flatten(0, 1))
            start += h * w
        assert mine_kept
        if count_newlines:
            spent = len(mine_kept) + sum(newlines_of(mine_kept, videos)[v] for v in members)
            assert spent + left == min(max(budget, paid + min(of[1] for of in costs)), whole + paid)
        kept += mine_kept
        frame += len(shapes)
    for v in range(len(grids)):
        counts.append(sum(starts[v] <= row < starts[v + 1] for row in kept))
    assert selection.indices.tolist() == kept
    assert selection.n.tolist() == counts
    if len(kept) == len(videos.tokens):
        assert selection.tokens is None
    else:
        torch.testing.assert_close(selection.tokens, torch.cat(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("h", range(1, 9))
@pytest.mark.parametrize("w", [1, 2, 3, 7, 14])
def test_ladders(h, w):
    assert grid_ladder(h, w) == ladder(h, w)


def test_a_square_ladder_is_the_published_one():
    for n in range(1, 197):
        a = int(n**0.5)
        fits = [size for size in ((a, a), (a + 1, a), (a, a + 1)) if size[0] * size[1] <= n]
        best = [size for size in grid_ladder(14, 14) if size[0] * size[1] <= n][-1]
        assert best[0] * best[1] == max(a * b for a, b in fits)
        assert abs(best[0] - best[1]) <= 1


@pytest.mark.parametrize("mode", ["bilinear", "adaptive_avg", "linspace", "merge", "merge_separable"])
def test_modes(mode):
    videos = make_videos([(2, 3, 4), (3, 4, 2), (1, 3, 4)], [0, 0, 1])
    scores = torch.tensor([1.0, 2.0, 0.5, 1.0, 0.0, 3.0])
    selection = QuoTA(scores, total_tokens=17, mode=mode).select(videos)
    _, sizes, unused = selection.extras
    assert int(sizes[:5].prod(1).sum()) + int(unused[0]) == 17
    assert int(unused[1]) == 0
    assert int(sizes[5].prod()) == 12
    if mode == "merge":
        assert unused.tolist() == [0, 0]
    assert torch.equal(
        selection.scores,
        torch.cat(
            [scores[:2].repeat_interleave(12), scores[2:5].repeat_interleave(8), scores[5:].repeat_interleave(12)]
        ),
    )
    offset = start = 0
    for frame, ((h, w), (a, b)) in enumerate(zip([(3, 4)] * 2 + [(4, 2)] * 3 + [(3, 4)], sizes.tolist(), strict=True)):
        n = a * b
        ours, places = selection.tokens[offset : offset + n], selection.indices[offset : offset + n] - start
        tokens = videos.tokens[start : start + h * w]
        if mode in ("bilinear", "adaptive_avg") and n:
            picture = tokens.view(1, h, w, -1).permute(0, 3, 1, 2)
            resize = {
                "bilinear": lambda x, size: F.interpolate(x, size=size, mode="bilinear", align_corners=False),
                "adaptive_avg": F.adaptive_avg_pool2d,
            }[mode]
            wanted = resize(picture, (a, b))[0].permute(1, 2, 0).flatten(0, 1)
        elif mode == "linspace":
            wanted = tokens[torch.linspace(0, h * w - 1, n).long()]
        elif mode == "merge_separable":
            wanted, _, _ = qts_kernels.merge_rows_columns(tokens.view(1, h, w, -1), torch.tensor([[a, b]]))
        elif n:
            wanted, _, _, rows = qts_kernels.merge_tokens(tokens[None], torch.tensor([n]), with_rows=True)
            members = [(rows[0] == row).nonzero().squeeze(1).tolist() for row in range(n)]
            middle = [nearest(of, w) for of in members]
            order = sorted(range(n), key=lambda row: middle[row])
            assert places.tolist() == sorted(middle)
            wanted = wanted[order]
        if n:
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-10)
        assert bool(((places >= 0) & (places < h * w)).all()), frame
        offset, start = offset + n, start + h * w
    assert offset == len(selection.indices)


def nearest(tokens, width):
    """The one nearest to the middle of them all, in fractions."""
    row = Fraction(sum(t // width for t in tokens), len(tokens))
    column = Fraction(sum(t % width for t in tokens), len(tokens))
    return min(tokens, key=lambda t: ((t // width - row) ** 2 + (t % width - column) ** 2, t))


def test_group_places_leave_out_what_went_nowhere():
    rows = torch.tensor([[0, 1, 0, 0], [-1, -1, -1, -1], [2, 2, 2, 2]])
    assert group_places(rows, 3, 2).tolist() == [2, 1, 8]  # the middle of (0, 0), (1, 0), (1, 1); of four: the first


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from(["bilinear", "adaptive_avg", "linspace", "merge", "merge_separable"]))
def test_no_token_of_the_budget_is_lost_from_sight(case, mode):
    """What is kept, newlines included where they count, and what is unused are the budget of every sample."""
    grids, sample, scores, kind, budget, count_newlines = case
    videos = make_videos(grids, sample, kind)
    selection = QuoTA(scores, total_tokens=budget, mode=mode, include_newlines=count_newlines).select(videos)
    newlines = newlines_of(selection.indices.tolist(), videos)
    noted = [note for note in selection.notes if note.startswith("no frame can use")]
    for s in sorted(set(sample)):
        members = [v for v, of in enumerate(sample) if of == s]
        kept = sum(int(selection.n[v]) for v in members)
        whole = sum(videos.lengths[v] for v in members)
        least = 1
        if count_newlines:
            kept += sum(newlines[v] for v in members)
            spans = [videos.newline_spans[v] for v in members]
            whole += sum(videos.lengths[v] // span for v, span in zip(members, spans, strict=True) if span)
            videos_own = [0 < span == videos.lengths[v] for v, span in zip(members, spans, strict=True)]
            least += sum(videos_own) + all(span > 0 and not own for span, own in zip(spans, videos_own, strict=True))
        assert kept + int(selection.extras[2][s]) == min(max(budget, least), whole)
    assert len(noted) == int((selection.extras[2] > 0).sum())


def test_merging_leaves_room_for_rows_that_it_does_not_touch():
    videos = make_videos([(1, 3, 4)], [0], "row")
    videos.tokens[:] = torch.eye(12, WIDTH, dtype=torch.float64)
    videos.tokens[:8] = videos.tokens[0]
    selection = QuoTA([1.0], total_tokens=6, mode="merge").select(videos)
    assert selection.extras[1].tolist() == [[1, 3]]
    assert selection.indices.tolist() == [5, 7, 11]  # in two of three rows
    assert selection.extras[2].tolist() == [1]
    assert selection.notes == ("no frame can use 1 of the 6 tokens of the budget",)


@pytest.mark.parametrize("mode", ["bilinear", "merge"])
def test_one_hot_frame_gets_its_own_grid_and_the_rest_is_shared(mode):
    videos = make_videos([(4, 4, 4)], [0])
    selection = QuoTA([0, 0, 9, 0], total_tokens=28, mode=mode).select(videos)
    assert selection.extras[0].tolist() == [4, 4, 16, 4]
    assert selection.extras[1].prod(1).tolist() == [4, 4, 16, 4]
    torch.testing.assert_close(selection.tokens[8:24], videos.tokens[32:48], rtol=0, atol=0)


def test_no_scores_weigh_all_frames_the_same():
    videos = make_videos([(4, 4, 4)], [0])
    selection = QuoTA([0.0] * 4, total_tokens=16).select(videos)
    assert selection.extras[1].tolist() == [[2, 2]] * 4


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scores_of_any_size(scale):
    videos = make_videos([(3, 4, 4)], [0])
    plain = QuoTA([1.0, 2.0, 4.0], 20, power=7).select(videos)
    scaled = QuoTA(torch.tensor([1.0, 2.0, 4.0]) * scale, 20, power=7).select(videos)
    assert torch.equal(plain.indices, scaled.indices)


def test_budgets_are_of_samples():
    videos = make_videos([(2, 4, 4), (2, 4, 4), (4, 4, 4)], [0, 0, 1])
    selection = QuoTA([1.0] * 8, total_tokens=16).select(videos)
    assert selection.n.tolist() == [8, 8, 16]
    selection = QuoTA([1.0] * 8, total_tokens=None, retention_ratio=0.25).select(videos)
    assert selection.n.tolist() == [8, 8, 16]


@pytest.mark.parametrize("options", [{"total_tokens": 34}, {"total_tokens": None}, {"retention_ratio": 1.0}])
@pytest.mark.parametrize("mode", ["bilinear", "merge"])
def test_a_budget_that_holds_everything_scores_nothing(options, mode):
    class Never:
        def score(self, videos):
            raise AssertionError("scored")

    videos = make_videos([(2, 3, 4), (1, 2, 4)], [0, 1], "row")
    selection = QuoTA(Never(), mode=mode, **options).select(videos)
    assert selection.indices.tolist() == list(range(32))
    assert selection.tokens is None
    assert selection.extras[2].tolist() == [0, 0]


def test_relevance_of_frames():
    videos = make_videos([(2, 2, 3), (1, 3, 2), (2, 2, 2)], [0, 0, 1], question=True)
    found = FrameRelevance().score(videos)
    unit = lambda x: x / (x.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    wanted = []
    for tokens, question, areas in (
        (videos.tokens[:18], videos.question[:2], [6, 6, 6]),
        (videos.tokens[18:], videos.question[4:], [4, 4]),
    ):
        weights = (unit(question) @ unit(tokens).T / WIDTH**0.5).softmax(1)
        wanted += [part.max() for part in weights.amax(0).split(areas)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(wanted).float(), rtol=1e-6, atol=0)
    assert QuoTA("relevance").needs_question
    assert not QuoTA([1.0]).needs_question
    videos.question = None
    with pytest.raises(ValueError, match=r"videos\.question is None"):
        QuoTA("relevance", 8).select(videos)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"total_tokens": 0}, "total_tokens must be at least 1, got 0"),
        (ValueError, {"retention_ratio": 1.5}, r"retention_ratio must be in \(0, 1\]"),
        (ValueError, {"mode": "nearest"}, "mode must be one of bilinear, adaptive_avg, linspace, merge, "),
        (ValueError, {"power": -1}, "power must be finite and at least 0, got -1"),
        (ValueError, {"scorer": "clip"}, "a scorer given by name must be \"relevance\", got 'clip'"),
        (TypeError, {"scorer": 3}, r"an object with score\(videos\).*got 3"),
    ],
)
def test_bad_options(error, options, message):
    with pytest.raises(error, match=message):
        QuoTA(**{"scorer": [1.0], **options})


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], r"one number for each of 2 time steps, got \[1\]"),
        ([[1.0, 2.0]], r"one number for each of 2 time steps, got \[1, 2\]"),
        ([1.0, float("nan")], "finite and not negative, got .*nan"),
        ([1.0, -1.0], "finite and not negative"),
    ],
)
def test_bad_scores(scores, message):
    with pytest.raises(ValueError, match=message):
        QuoTA(scores, 4).select(make_videos([(2, 2, 2)], [0]))


def test_videos_that_lost_tokens_are_refused():
    videos = make_videos([(2, 2, 2)], [0])
    videos.lengths = [5]
    with pytest.raises(ValueError, match="put it first in a Chain"):
        QuoTA([1.0, 2.0], 4).select(videos)
