"""QuoTA in every model: the answer is that of the resized grids at the places that they take."""

import pytest
import qts_video
import torch
import torch.nn.functional as F
from qts_video.adapters import find_adapter
from qts_video.methods import QuoTA
from tiny import Oracle, keep_mask, rows

GREEDY = {"max_new_tokens": 4, "do_sample": False}
NAMES = pytest.mark.parametrize("name", ["one", "unequal", "several"])
MODES = ("bilinear", "adaptive_avg", "linspace", "merge", "merge_separable")


class Ramp:
    """Scores 0, 1, 2, 0, 1, 2, ... of the time steps."""

    def score(self, videos):
        return torch.arange(sum(t for t, _, _ in videos.grids)).float() % 3


class Watch(QuoTA):
    """Remembers what it was given and returned last."""

    calls = 0

    def select(self, videos):
        self.calls += 1
        self.videos, self.selection = videos, super().select(videos)
        return self.selection


def layout_of(model, batch):
    return find_adapter(model).locate(model, batch["input_ids"], batch["attention_mask"].bool(), batch, None)


def totals(model, batch):
    """Tokens and newlines of the videos of each sample that has one."""
    layout = layout_of(model, batch)
    of_sample = layout.per_sample([m + n for m, n in zip(layout.lengths, layout.newlines, strict=True)])
    return [total for total in of_sample if total]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
@NAMES
def test_the_answer_is_that_of_the_resized_frames(family, model, name, side, positions):
    batch = family.inputs(*family.prompts[name], side=side)
    watch = Watch(Ramp(), retention_ratio=0.5)
    with qts_video.attach(model, watch, positions=positions) as handle, torch.no_grad():
        logits = model(**batch).logits
    selection, videos = watch.selection, watch.videos
    tokens, start, frame = [], 0, 0
    for t, h, w in videos.grids:
        for _ in range(t):
            a, b = selection.extras[1][frame].tolist()
            if a:
                picture = videos.tokens[start : start + h * w].view(1, h, w, -1).permute(0, 3, 1, 2)
                resized = F.interpolate(picture, size=(a, b), mode="bilinear", align_corners=False)
                tokens.append(resized[0].permute(1, 2, 0).flatten(0, 1))
            start, frame = start + h * w, frame + 1
    replaced = torch.cat(tokens)
    torch.testing.assert_close(selection.tokens, replaced, rtol=0, atol=1e-10)
    keep = keep_mask(model, batch, selection.indices, drop_steps=True)
    oracle = Oracle(model, batch, keep, compact=positions == "compact", replaced=replaced)
    for ours, theirs in zip(rows(logits, handle.last.columns >= 0), rows(oracle.logits(), keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    if side == "left":
        with qts_video.attach(model, QuoTA(Ramp(), retention_ratio=0.5), positions=positions):
            generated = model.generate(**batch, **GREEDY)
        assert torch.equal(generated[:, -4:], oracle.greedy(4)[0])


@pytest.mark.parametrize("mode", MODES)
def test_the_report_counts_the_budget(family, model, mode):
    """Newlines included, and what no grid could use."""
    batch = family.inputs(*family.prompts["several"])
    watch = Watch(Ramp(), total_tokens=9, mode=mode)
    with qts_video.attach(model, watch) as handle, torch.no_grad():
        logits = model(**batch).logits
    keep = keep_mask(model, batch, watch.selection.indices, drop_steps=True)
    oracle = Oracle(model, batch, keep, replaced=watch.selection.tokens)
    for ours, theirs in zip(rows(logits, handle.last.columns >= 0), rows(oracle.logits(), keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    of_sample = [0] * len(keep)
    for video in handle.last.videos:
        of_sample[video.sample] += video.kept
    for kept, unused in zip(of_sample, watch.selection.extras[2].tolist(), strict=True):
        assert kept + unused == 9
    assert all(len(video.scores) == video.total - video.newlines for video in handle.last.videos)


def test_rotary_positions_stay_spread_over_the_frame(model, family):
    batch = family.inputs(*family.prompts["one"])
    (grid,) = layout_of(model, batch).grids
    t, h, w = grid
    with qts_video.attach(model, QuoTA([1.0] * t, total_tokens=t, include_newlines=False)) as handle, torch.no_grad():
        model(**batch)
    (video,) = handle.last.videos
    assert video.frame.tolist() == list(range(t))
    assert video.row.tolist() == [h // 2] * t
    assert video.column.tolist() == [w // 2] * t


@pytest.mark.parametrize("mode", MODES)
@NAMES
def test_keeping_everything_is_bit_identical(family, model, name, mode):
    batch = family.inputs(*family.prompts[name])
    most = max(totals(model, batch))
    with torch.no_grad():
        plain = model(**batch).logits
        for options in ({"retention_ratio": 1.0}, {"total_tokens": most}, {}):
            with qts_video.attach(model, QuoTA(Ramp(), mode=mode, **options)) as handle:
                assert torch.equal(model(**batch).logits, plain)
                assert handle.last.kept == handle.last.total


def test_one_sample_may_keep_everything_while_another_does_not(family, model):
    """Its grids go through the resampling, which changes nothing."""
    batch = family.inputs(*family.prompts["unequal"])
    most = max(totals(model, batch))
    watch = Watch(Ramp(), total_tokens=most - 3)
    with qts_video.attach(model, watch) as handle, torch.no_grad():
        model(**batch)
    for video in handle.last.videos:
        if video.total <= most - 3:
            assert video.kept == video.total
    whole = (watch.selection.extras[1] == torch.tensor([g[1:] for g in watch.videos.grids for _ in range(g[0])])).all(1)
    areas = torch.tensor([g[1] * g[2] for g in watch.videos.grids for _ in range(g[0])])
    unchanged = whole.repeat_interleave(areas)[watch.selection.indices]
    theirs = watch.videos.tokens[watch.selection.indices]
    assert bool(unchanged.any())
    assert torch.equal(watch.selection.tokens[unchanged], theirs[unchanged])


def test_frames_scored_by_relevance(family, model):
    batch = family.inputs(*family.prompts["several"])
    with qts_video.attach(model, QuoTA("relevance", total_tokens=9)) as handle, torch.no_grad():
        handle.question([30, 31])
        logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    assert 0 < handle.last.kept < handle.last.total
    for video in handle.last.videos:
        area = video.grid[1] * video.grid[2]
        assert len(set(video.scores.tolist())) == video.grid[0] == len(video.scores) // area


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beams", "static"])
def test_other_ways_to_generate(family, model, options):
    """Beams select once a sample, and the same as a forward call."""
    if not family.repeats and "num_beams" in options:
        pytest.skip("this version repeats the samples of this model wrongly")
    batch = family.inputs(*family.prompts["several"])
    forward, watch = Watch(Ramp(), total_tokens=9), Watch(Ramp(), total_tokens=9)
    with qts_video.attach(model, forward), torch.no_grad():
        model(**batch)
    with qts_video.attach(model, watch) as handle:
        ours = model.generate(**batch, **GREEDY, **options)
    assert watch.calls == 1
    assert torch.equal(watch.selection.indices, forward.selection.indices)
    torch.testing.assert_close(watch.selection.tokens, forward.selection.tokens, rtol=0, atol=1e-10)
    assert len(handle.last.columns) == len(batch["input_ids"]) == len(ours)
    if "num_beams" not in options:
        keep = keep_mask(model, batch, watch.selection.indices, drop_steps=True)
        wanted, _ = Oracle(model, batch, keep, replaced=forward.selection.tokens).greedy(4)
        assert torch.equal(ours[:, -4:], wanted)


def test_gradients_reach_the_vision_tower(family, model):
    batch = family.inputs(*family.prompts["one"])
    with qts_video.attach(model, QuoTA(Ramp(), retention_ratio=0.5)):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.get_submodule(family.vision).parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


@pytest.mark.parametrize("mode", MODES)
def test_lower_precision(family, mode):
    model = family.build_model().to(torch.bfloat16)
    watch = Watch("relevance", total_tokens=9, mode=mode)
    batch = family.inputs(*family.prompts["several"])
    with qts_video.attach(model, watch) as handle, torch.no_grad():
        handle.question([30, 31])
        assert torch.isfinite(model(**batch).logits).all()
    assert watch.selection.tokens.dtype == torch.bfloat16
