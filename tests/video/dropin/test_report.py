"""``handle.last``: what was kept, where it lies in the video, when, and what it took."""

import pytest
import qts_video
import torch
from qts_video.methods import Uniform
from tiny import Image, Keep, Video, every, keep_all, prompt, user
from tiny_qwen import inputs

BATCH = inputs(
    prompt(user(Image(), Video(4, 2, 3, seconds=0.5), [30], Video(2, 3, 2, seconds=2.5), [31])),
    prompt(user(Video(3, 1, 2, seconds=1.0), [32])),
)


def last(model, selector, batch=BATCH, **options):
    with qts_video.attach(model, selector, **options) as handle, torch.no_grad():
        model(**batch)
    return handle.last


def test_every_video_has_its_indices_places_and_times(model):
    selector = Keep(every(2), scores=True)
    report = last(model, selector)
    kept, start = selector.kept, 0
    grids, seconds = [(4, 2, 3), (2, 3, 2), (3, 1, 2)], [0.5, 2.5, 1.0]
    for video, sample, grid, step in zip(report.videos, [0, 0, 1], grids, seconds, strict=True):
        t, rows, columns = grid
        total = t * rows * columns
        indices = kept[(kept >= start) & (kept < start + total)] - start
        assert (video.sample, video.grid, video.total, video.kept) == (sample, grid, total, len(indices))
        assert torch.equal(video.indices, indices)
        assert video.indices.dtype == video.frame.dtype == video.row.dtype == video.column.dtype == torch.int64
        cells = [(f, r, c) for f in range(t) for r in range(rows) for c in range(columns)]
        places = zip(video.frame.tolist(), video.row.tolist(), video.column.tolist(), strict=True)
        assert list(places) == [cells[i] for i in indices]
        assert video.seconds.dtype == video.frame_seconds.dtype == video.scores.dtype == torch.float32
        assert video.frame_seconds.tolist() == [f * step for f in range(t)]
        assert video.seconds.tolist() == [cells[i][0] * step for i in indices]
        assert video.scores.tolist() == list(range(start, start + total))
        start += total
    assert (report.total, report.kept) == (42, len(kept))
    assert report.retention_ratio == len(kept) / 42
    assert report.positions == "original"
    assert last(model, selector, positions="compact").positions == "compact"


def test_timestamps_are_given_to_the_selector_even_below_a_second_a_step(model):
    """Up to 5.17 the model truncates second_per_grid_ts < 1 to 0 in its temporal positions; the seconds must not."""
    selector = Keep(every(2))
    report = last(model, selector)
    (videos,) = selector.calls
    assert videos.timestamps.dtype == torch.float32
    assert videos.timestamps[:24].tolist() == [f * 0.5 for f in range(4) for _ in range(6)]
    assert videos.timestamps[24:36].tolist() == [f * 2.5 for f in range(2) for _ in range(6)]
    assert videos.grids == [(4, 2, 3), (2, 3, 2), (3, 1, 2)]
    assert videos.lengths == [24, 12, 6]
    assert videos.cu_seqlens.tolist() == [0, 24, 36, 42]
    assert videos.cu_seqlens.dtype == torch.int32
    assert videos.sample == [0, 0, 1]
    assert report.seconds_from == "inputs"


@pytest.mark.parametrize("times", [1, 3])
def test_generate_reports_the_same_seconds(model, times):
    """From 5.18, generate() takes the grids away and repeats the seconds for every beam."""
    selector = Keep(lambda videos: [torch.tensor([int(start)]) for start in videos.cu_seqlens[:-1]])
    with qts_video.attach(model, selector) as handle:
        model.generate(**BATCH, max_new_tokens=2, num_beams=times, do_sample=False)
    steps = [video.frame_seconds[1].item() for video in handle.last.videos]
    assert steps == [0.5, 2.5, 1.0]


def test_seconds_as_a_list(model):
    batch = BATCH | {"second_per_grid_ts": BATCH["second_per_grid_ts"].tolist()}
    assert [video.frame_seconds[1].item() for video in last(model, Keep(every(2)), batch).videos] == [0.5, 2.5, 1.0]


def test_missing_seconds_are_the_models_default_and_the_report_says_so(model):
    batch = inputs(prompt(user(Video(3), [30])))
    del batch["second_per_grid_ts"]
    report = last(model, Keep(every(2)), batch)
    assert report.seconds_from == "default"
    assert report.videos[0].frame_seconds.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(("given", "steps"), [(3, [3.0, 3.0, 3.0]), ([0.25, 4, 2.0], [0.25, 4.0, 2.0])])
def test_given_seconds_are_the_ones_that_count(model, given, steps, stated):
    batch = BATCH if stated else {name: value for name, value in BATCH.items() if name != "second_per_grid_ts"}
    selector = Keep(every(2))
    with qts_video.attach(model, selector) as handle, torch.no_grad():
        logits = model(**batch).logits
        assert handle.last.seconds_from == ("inputs" if stated else "default")
        assert handle.seconds_per_step(given) is handle
        assert torch.equal(model(**batch).logits, logits)
        report = handle.last
        assert report.seconds_from == "given"
        assert [video.frame_seconds[1].item() for video in report.videos] == steps
        grids = ((4, 6), (2, 6), (3, 2))
        wanted = [t * step for (n, area), step in zip(grids, steps, strict=True) for t in range(n) for _ in range(area)]
        assert selector.calls[-1].timestamps.tolist() == wanted
        handle.seconds_per_step(None)
        model(**batch)
        assert handle.last.seconds_from == ("inputs" if stated else "default")


def test_given_seconds_must_be_one_a_video(model):
    selector = Keep(every(2))
    with qts_video.attach(model, selector) as handle, torch.no_grad():
        handle.seconds_per_step([1.0, 2.0])
        with pytest.raises(ValueError, match="seconds_per_step was given 2 values for 3 videos"):
            model(**BATCH)
        assert selector.calls == []


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), float("inf"), [], [1.0, 0.0]])
def test_given_seconds_must_be_positive(model, seconds):
    with (
        qts_video.attach(model, Keep(every(2))) as handle,
        pytest.raises(ValueError, match="must be positive and finite, got"),
    ):
        handle.seconds_per_step(seconds)


@pytest.mark.parametrize("seconds", ["1.0", ["1.0"], torch.ones(2)])
def test_given_seconds_must_be_numbers(model, seconds):
    with (
        qts_video.attach(model, Keep(every(2))) as handle,
        pytest.raises(TypeError, match="a number, or a list with one a video; got"),
    ):
        handle.seconds_per_step(seconds)


def test_no_scores_are_none(model):
    assert [video.scores for video in last(model, Uniform(0.5)).videos] == [None] * 3


def test_timings_and_the_table(model):
    report = last(model, Uniform(0.5))
    assert set(report.timings) == {"vision", "selection", "prefill"}
    assert all(0 < seconds < 60 for seconds in report.timings.values())
    table = str(report)
    assert "uniform: 21 of 42 video tokens kept (50.0%), original positions" in table
    assert table.count("\n") == 4


def test_timings_are_of_one_prefill(model):
    """Neither images before it nor earlier prefills are counted in."""
    with qts_video.attach(model, Uniform(0.5)) as handle, torch.no_grad():
        for _ in range(3):
            model(**inputs(prompt(user(Image(), [30]))))
            model(**BATCH)
        spans = handle.last._stopwatch._spans
    assert {name: len(found) for name, found in spans.items()} == {"vision": 2, "selection": 1, "prefill": 1}


def test_before_any_video_there_is_nothing_to_report(model):
    with qts_video.attach(model, Uniform(0.5)) as handle, torch.no_grad():
        with pytest.raises(RuntimeError, match="uniform has not selected anything yet"):
            _ = handle.last
        model(**inputs(prompt(user([30]))))
        with pytest.raises(RuntimeError, match="not selected anything yet"):
            _ = handle.last
        model(**BATCH)
        report = handle.last
        model(**inputs(prompt(user([30]))))
        assert handle.last is report


def test_keeping_everything_is_reported_too(model):
    report = last(model, Keep(keep_all))
    assert report.kept == report.total == 42
    assert report.columns.shape == BATCH["input_ids"].shape
    assert torch.equal(report.columns >= 0, BATCH["attention_mask"].bool())
