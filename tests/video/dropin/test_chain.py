"""Methods one after another, in every model: what the second is given, and what is kept in the end."""

import pytest
import qts_video
import torch
from exact_attention import exact_attention
from qts_video.adapters import find_adapter
from qts_video.flexselect.relevance import relevance_by_layer
from qts_video.methods import Chain, FlexSelect, QTSplus, QuoTA, Random, Uniform, Videos
from tiny import IMAGE, VIDEO, Keep, Oracle, every, keep_all, keep_mask, rows

from qts_kernels import Selection

GREEDY = {"max_new_tokens": 4, "do_sample": False}
NAMES = pytest.mark.parametrize("name", ["one", "unequal", "several"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])
pytestmark = pytest.mark.filterwarnings("ignore:training-free FlexSelect")


class Ramp:
    """Scores 0, 1, 2, 0, 1, 2, ... of the time steps: some lose all their tokens."""

    def score(self, videos):
        return torch.arange(sum(t for t, _, _ in videos.grids)).float() % 3


class Watch:
    """A method, and what it was given and returned."""

    def __init__(self, method):
        self.method, self.calls = method, []
        self.name, self.needs_question = method.name, method.needs_question
        self.drops_empty_steps = getattr(method, "drops_empty_steps", False)

    def select(self, videos):
        selection = self.method.select(videos)
        self.calls.append((videos, selection))
        return selection


class Probe(Keep):
    """Keeps everything, and runs the decoder on the prompt that it is given."""

    def __init__(self):
        super().__init__(keep_all)

    def select(self, videos):
        context = videos.context
        batch, length = context.input_ids.shape
        inputs = context.take(torch.arange(batch), torch.arange(length).expand(batch, -1))
        self.videos = videos
        self.hidden = context.decoder(
            **inputs,
            position_ids=context.position_ids,
            attention_mask=context.layout.valid.long(),
            use_cache=False,
        )[0]
        return super().select(videos)


def quota(**options):
    return QuoTA(Ramp(), **{"total_tokens": 11, **options})


FIRSTS = pytest.mark.parametrize(
    "first", [lambda: Keep(every(2)), quota, lambda: Keep(every(3, 1), tokens=lambda kept: kept * 2)]
)


@FIRSTS
@SIDES
@NAMES
def test_the_next_method_is_given_the_shortened_prompt(family, model, name, side, first):
    batch, probe = family.inputs(*family.prompts[name], side=side), Probe()
    with qts_video.attach(model, first()) as handle, torch.no_grad():
        logits = model(**batch).logits
        columns, report = handle.last.columns, handle.last
    with qts_video.attach(model, Chain([first(), probe])) as handle, torch.no_grad():
        again = model(**batch).logits
        assert torch.equal(handle.last.columns, columns)
        assert [v.indices.tolist() for v in handle.last.videos] == [v.indices.tolist() for v in report.videos]
    wanted = rows(logits, columns >= 0)
    for found in (again, model.get_output_embeddings()(probe.hidden)):
        for ours, theirs in zip(rows(found, columns >= 0), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@FIRSTS
@SIDES
@NAMES
def test_its_layout_is_that_of_the_shortened_prompt(family, model, name, side, first):
    batch, probe = family.inputs(*family.prompts[name], side=side), Probe()
    before = find_adapter(model).locate(model, batch["input_ids"], batch["attention_mask"].bool(), batch, None)
    with qts_video.attach(model, Chain([first(), probe])) as handle, torch.no_grad():
        model(**batch)
    videos, context, report = probe.videos, probe.videos.context, handle.last
    layout, columns = context.layout, report.columns
    length = columns.shape[1]
    assert torch.equal(layout.valid, columns >= 0)
    assert torch.equal(context.inputs_embeds.flatten(0, 1)[layout.rows], videos.tokens)
    assert videos.lengths == layout.lengths == [len(v.indices) for v in report.videos]
    assert videos.grids == before.grids
    assert videos.cu_seqlens.tolist() == torch.tensor([0, *videos.lengths]).cumsum(0).tolist()
    torch.testing.assert_close(videos.timestamps, torch.cat([v.seconds for v in report.videos]), rtol=0, atol=0)
    ids = batch["input_ids"].gather(1, columns.clamp(min=0))
    assert torch.equal(layout.input_ids[layout.valid], ids[layout.valid])
    assert torch.equal(context.input_ids, layout.input_ids)
    for v, sample in enumerate(layout.sample):
        old, new = before.frame_spans[v], layout.frame_spans[v]
        for (start, stop), (here, there) in zip(old.tolist(), new.tolist(), strict=True):
            inside = (columns[sample] >= start) & (columns[sample] < stop)
            assert there - here == int(inside.sum())
            assert there == here or inside[here:there].all()
    newlines = set(before.newline_rows.tolist())
    for row in layout.newline_rows.tolist():
        sample, column = divmod(row, length)
        assert sample * before.columns + int(columns[sample, column]) in newlines
    whole = [0 < span == m for span, m in zip(before.newline_spans, before.lengths, strict=True)]
    assert layout.newlines == [int(w and n > 0) for w, n in zip(whole, layout.lengths, strict=True)]
    assert videos.newline_spans == [n * w for w, n in zip(whole, layout.lengths, strict=True)]


@NAMES
@pytest.mark.parametrize("side", ["left", "right"])
def test_relevance_behind_quota_is_attention_in_the_shortened_prompt(family, model, name, side):
    batch = family.inputs(*family.prompts[name], side=side)

    class Scores(Keep):
        def select(self, videos):
            self.videos, self.relevance = videos, relevance_by_layer(videos, [1])[1]
            return super().select(videos)

    scores = Scores(keep_all)
    with qts_video.attach(model, Chain([quota(), scores])) as handle, torch.no_grad():
        model(**batch)
        columns = handle.last.columns
    with (
        qts_video.attach(model, quota()),
        exact_attention(find_adapter(model).parts(model).decoder, columns >= 0) as exact,
        torch.no_grad(),
    ):
        model(**batch)
    layout, wanted = scores.videos.context.layout, []
    for of_video, sample in zip(layout.rows.split(layout.lengths), layout.sample, strict=True):
        if len(of_video) == 0:
            continue
        places, ids = (of_video % layout.columns).tolist(), layout.input_ids[sample].tolist()
        steps = layout.in_steps(sample).tolist()
        text = [
            c
            for c in range(places[-1] + 1, layout.columns)
            if layout.valid[sample, c] and ids[c] not in (IMAGE, VIDEO) and not steps[c]
        ]
        wanted.append(exact.weights[1][sample][:, text][:, :, places].amax((0, 1)))
    torch.testing.assert_close(scores.relevance, torch.cat(wanted), rtol=0, atol=1e-10)


@NAMES
def test_quota_then_flexselect(family, model, name):
    """By hand: the best of what QuoTA kept, its resized tokens, at the places that they had."""
    batch = family.inputs(*family.prompts[name])
    first, second = Watch(quota()), Watch(FlexSelect(1, max_tokens=4))
    with qts_video.attach(model, Chain([first, second])) as handle, torch.no_grad():
        assert handle is not None
        logits = model(**batch).logits
        generated = model.generate(**batch, **GREEDY)
    (videos, resized), (left, best) = first.calls[-1], second.calls[-1]
    rank, start = [], 0
    for length, span in zip(left.lengths, left.newline_spans, strict=True):
        count = min(4, length + (span > 0))
        count = max(count - (span > 0), min(length, 1))
        of_video = best.scores[start : start + length].argsort(descending=True, stable=True)[:count]
        rank += (of_video.sort().values + start).tolist()
        start += length
    indices, tokens = resized.indices[rank], resized.tokens[rank]
    assert [n for v in handle.last.videos for n in v.indices.tolist()] == [
        int(i) - sum(videos.lengths[:v])
        for v in range(len(videos.lengths))
        for i in indices
        if sum(videos.lengths[:v]) <= i < sum(videos.lengths[: v + 1])
    ]
    keep = keep_mask(model, batch, indices, drop_steps=True)
    oracle = Oracle(model, batch, keep, replaced=tokens)
    columns = handle.last.columns
    for ours, theirs in zip(rows(logits, columns >= 0), rows(oracle.logits(), keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert torch.equal(generated[:, -4:], oracle.greedy(4)[0])
    reported = torch.cat([video.scores for video in handle.last.videos])
    wanted = torch.zeros(len(videos.tokens)).index_copy(0, resized.indices, best.scores)
    torch.testing.assert_close(reported, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("query", ["prompt", "question"])
@NAMES
def test_sets_of_frames_behind_quota(family, model, name, query):
    """Some sets have lost all their tokens."""
    batch = family.inputs(*family.prompts[name])
    second = Watch(FlexSelect(1, retention_ratio=0.5, frames_per_set=2, query=query))
    question = [[next(i for i in reversed(ids) if 30 <= i < 40)] for ids in batch["input_ids"].tolist()]
    with qts_video.attach(model, Chain([quota(), second])) as handle, torch.no_grad():
        handle.question(question)
        assert torch.isfinite(model(**batch).logits).all()
    left, best = second.calls[0]
    spans = left.newline_spans
    budgets = [-(-(m + (s > 0)) // 2) for m, s in zip(left.lengths, spans, strict=True)]
    wanted = [max(n - (s > 0), min(n, 1)) for n, s in zip(budgets, spans, strict=True)]
    assert best.n.tolist() == wanted == [len(video.indices) for video in handle.last.videos]


@SIDES
@pytest.mark.parametrize("last", [lambda m: Uniform(0.5), lambda m: Random(0.4), QTSplus.from_language_model])
def test_other_methods_behind_quota(family, model, last, side):
    batch = family.inputs(*family.prompts["several"], side=side)
    first, second = Watch(quota(mode="merge")), Watch(last(model))
    with qts_video.attach(model, Chain([first, second])) as handle, torch.no_grad():
        handle.question([30, 31])
        logits = model(**batch).logits
    (_, resized), (_, best) = first.calls[0], second.calls[0]
    kept = best.indices[: int(best.cu_seqlens[-1])]
    tokens = resized.tokens[kept] if best.tokens is None else best.tokens[: len(kept)]
    keep = keep_mask(model, batch, resized.indices[kept], drop_steps=True)
    oracle = Oracle(model, batch, keep, replaced=tokens)
    for ours, theirs in zip(rows(logits, handle.last.columns >= 0), rows(oracle.logits(), keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_keeping_everything_is_bit_identical(family, model):
    batch = family.inputs(*family.prompts["several"])
    with torch.no_grad():
        plain = model(**batch).logits
        with qts_video.attach(model, Chain([quota(total_tokens=None), Uniform(1.0), Keep(keep_all)])) as handle:
            assert torch.equal(model(**batch).logits, plain)
        assert handle.last.kept == handle.last.total


def test_beams_select_once_a_sample(family, model):
    if not family.repeats:
        pytest.skip("this version repeats the samples of this model wrongly")
    batch = family.inputs(*family.prompts["several"])
    found = []
    for call in (lambda: model(**batch), lambda: model.generate(**batch, **GREEDY, num_beams=3)):
        second = Watch(FlexSelect(1, max_tokens=4))
        with qts_video.attach(model, Chain([quota(), second])) as handle, torch.no_grad():
            call()
        assert len(second.calls) == 1
        found.append([v.indices.tolist() for v in handle.last.videos])
    assert found[0] == found[1]


def make_videos(lengths, spans=None):
    return Videos(
        tokens=torch.arange(sum(lengths)).double().unsqueeze(1).expand(-1, 3).contiguous(),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        lengths=lengths,
        grids=[(1, 1, length) for length in lengths],
        timestamps=torch.arange(sum(lengths)).float(),
        sample=[0] * len(lengths),
        newline_spans=spans or [],
    )


def test_uniform_twice_composes_indices():
    videos = make_videos([40, 9])
    once = Uniform(0.5).select(videos)
    chained = Chain([Uniform(0.5), Uniform(max_tokens=4)]).select(videos)
    wanted = [once.indices[:20][[2, 7, 12, 17]], once.indices[20:][[0, 1, 3, 4]]]
    assert torch.equal(chained.indices, torch.cat(wanted))
    assert chained.cu_seqlens.tolist() == [0, 4, 8]
    assert chained.tokens is None
    assert chained.scores is None


class Fixed:
    """Returns a selection; remembers the videos."""

    name, needs_question = "fixed", False

    def __init__(self, *selection):
        self.selection = Selection(**dict(zip(("indices", "cu_seqlens", "tokens", "scores"), selection, strict=False)))

    def select(self, videos):
        self.videos = videos
        return self.selection


def test_index_spaces_tokens_scores_and_padding_compose():
    videos = make_videos([4, 3, 2])
    first = Fixed(
        torch.tensor([1, 3, 4, 5, 6, -1, -1]),
        torch.tensor([0, 2, 5, 5], dtype=torch.int32),
        torch.arange(7.0).double().unsqueeze(1).expand(-1, 3) + 100,
        torch.arange(9.0),
    )
    second = Fixed(torch.tensor([0, 2, 4, -1]), torch.tensor([0, 1, 3, 3], dtype=torch.int32))
    third = Fixed(
        torch.tensor([0, 2]), torch.tensor([0, 1, 2, 2], dtype=torch.int32), None, torch.tensor([0.5, 0.25, 0.75])
    )
    two = Chain([first, second]).select(videos)
    assert two.indices.tolist() == [1, 4, 6, -1]
    assert two.tokens[:3, 0].tolist() == [100, 102, 104]
    assert torch.equal(two.scores, torch.arange(9.0))
    assert second.videos.lengths == [2, 3, 0]
    assert second.videos.tokens[:, 0].tolist() == [100, 101, 102, 103, 104]
    assert second.videos.timestamps.tolist() == [1, 3, 4, 5, 6]
    three = Chain([first, second, third]).select(videos)
    assert three.indices.tolist() == [1, 6]
    assert three.tokens[:, 0].tolist() == [100, 104]
    assert three.scores.tolist() == [0, 0.5, 0, 0, 0.25, 0, 0.75, 0, 0]
    assert third.videos.tokens[:, 0].tolist() == [100, 102, 104]
    assert three.cu_seqlens.tolist() == [0, 1, 2, 2]


def test_newlines_of_whole_videos_alone_are_counted_behind_the_first():
    for spans, wanted in (([4, 8], [0, 3]), ([2, 2], [0, 0])):
        second = Fixed(torch.tensor([0]), torch.tensor([0, 1, 1], dtype=torch.int32))
        Chain([Fixed(torch.tensor([5, 6, 7]), torch.tensor([0, 0, 3], dtype=torch.int32)), second]).select(
            make_videos([4, 8], spans)
        )
        assert second.videos.newline_spans == wanted


def test_what_is_needed_is_what_the_methods_need():
    asks = Keep(keep_all, needs_question=True)
    chain = Chain([Uniform(0.5), asks])
    assert chain.needs_question
    assert not Chain([Uniform(0.5)]).needs_question
    assert chain.name == "uniform+keep"
    sees = Keep(keep_all)
    sees.needs_vision = True
    assert Chain([sees, asks]).needs_vision
    assert not chain.needs_vision
    assert Chain([QuoTA([1.0]), asks]).needs_grids


def test_what_can_not_stand_behind_another():
    sees = Keep(keep_all)
    sees.needs_vision = True
    with pytest.raises(ValueError, match="quota needs whole frames, so it can only be the first"):
        Chain([Uniform(0.5), QuoTA([1.0])])
    with pytest.raises(ValueError, match=r"quota\+uniform needs whole frames"):
        Chain([Uniform(0.5), Chain([QuoTA([1.0]), Uniform(0.5)])])
    with pytest.raises(ValueError, match="keep reads the vision tower's features"):
        Chain([Uniform(0.5), sees])
    with pytest.raises(ValueError, match="at least one method"):
        Chain([])
    with pytest.raises(TypeError, match="made of selection methods, got 3"):
        Chain([Uniform(0.5), 3])
    with pytest.raises(TypeError, match="made of selection methods, got <class"):
        Chain([Uniform])


def test_a_bad_selection_is_refused_by_the_name_of_its_method(family, model):
    batch = family.inputs(*family.prompts["one"])
    bad = Keep(lambda videos: [torch.tensor([2, 1])])
    with (
        qts_video.attach(model, Chain([bad, Uniform(0.5)])),
        pytest.raises(ValueError, match=r"^keep: indices must be"),
    ):
        model(**batch)
