"""What is peculiar to LLaVA: the grid comes from the frames, the newlines from the placeholders or what was encoded."""

from itertools import product
from types import SimpleNamespace

import pytest
import qts_video
import torch
from qts_video.adapters import ADAPTERS
from qts_video.adapters._llava import count_tokens, newline_layouts
from qts_video.methods import Random, Uniform
from qts_video.methods.base import resolve_budget
from tiny import VERSION, VIDEO, Keep, Oracle, Video, every, keep_mask, prompt, rows, user
from tiny_llava import FAMILIES, NEXT, POSITIONS, cost, span_of, walk


def stub(family="llava_onevision", patches=5, **config):
    vision = SimpleNamespace(image_size=patches * 14, patch_size=14)
    config = {"image_token_id": 500, "video_token_id": VIDEO, "spatial_pool_stride": 2} | config
    return ADAPTERS[family], SimpleNamespace(config=SimpleNamespace(vision_config=vision, **config))


def locate_in(adapter, model, counts, videos, frames, **inputs):
    """The layout of samples with so many placeholders each."""
    longest = max(counts)
    ids = torch.tensor([[1, *[VIDEO] * count, *[2] * (longest - count + 1)] for count in counts])
    given = inputs or {"pixel_values_videos": torch.empty(videos, frames, 3, 1, 1)}
    return adapter.locate(model, ids, torch.ones_like(ids, dtype=torch.bool), given, None)


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("patches", [1, 2, 3, 5, 27])
@pytest.mark.parametrize("position", POSITIONS)
def test_the_layout_is_found_by_the_number_of_placeholders(position, patches, frames, configured):
    side = (patches + 1) // 2
    grid = (frames, side, side)
    count = len(walk(grid, position))
    adapter, model = stub(patches=patches, **({"mm_newline_position": position} if configured else {}))
    layout = locate_in(adapter, model, [2 * count, count], 3, frames)
    assert layout.grids == [grid] * 3
    assert layout.sample == [0, 0, 1]
    assert layout.newline_spans == [span_of(grid, position)] * 3
    assert layout.newlines == [count - frames * side * side] * 3


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(("patches", "frames"), [(2, 1), (3, 1), (3, 4), (5, 2), (27, 64)])
def test_unpooled_frames_are_told_from_pooled_ones(position, patches, frames):
    grid = (frames, patches, patches)
    count = len(walk(grid, position))
    layout = locate_in(*stub(patches=patches), [2 * count, count], 3, frames)
    assert layout.grids == [grid] * 3
    assert layout.newline_spans == [span_of(grid, position)] * 3
    with pytest.raises(ValueError, match=r"sample 0 has .* placeholders, but its videos' grids"):
        locate_in(*stub(patches=patches), [count + 1, 2 * count - 1], 3, frames)


def test_no_number_of_placeholders_is_that_of_both_grids():
    adapter, _ = stub()
    for patches in range(2, 40):
        pooled, unpooled = adapter.frame_grids(stub(patches=patches)[1])
        assert (pooled, unpooled) == (((patches + 1) // 2,) * 2, (patches,) * 2)
        for frames in range(1, 70):
            counts = [
                {count_tokens((frames, *size), span) for span in newline_layouts((frames, *size)).values()}
                for size in (pooled, unpooled)
            ]
            assert not counts[0] & counts[1]


def test_another_unpooled_layout_than_the_configured_one_raises():
    adapter, model = stub(mm_newline_position="grid")
    expected = r"'grid', but 52 .* of 2 frames of 5 x 5 tokens are the layout 'frame' \('grid' would be 60\)"
    with pytest.raises(ValueError, match=expected):
        locate_in(adapter, model, [52], 1, 2)


def test_the_published_grids():
    """LLaVA-Video-7B: 27 x 27 patches make 14 x 14 tokens, with newlines 210 a frame."""
    layout = locate_in(*stub(patches=27), [8 * 210], 1, 8)
    assert (layout.grids, layout.newlines) == ([(8, 14, 14)], [8 * 14])
    layout = locate_in(*stub(patches=27), [8 * 27 * 28], 1, 8)
    assert (layout.grids, layout.newlines) == ([(8, 27, 27)], [8 * 27])
    layout = locate_in(*stub("llava_next_video", patches=24), [32 * 144], 1, 32)
    assert (layout.grids, layout.newlines) == ([(32, 12, 12)], [0])


@pytest.mark.parametrize(("stride", "side"), [(1, 5), (2, 2), (3, 1)])
def test_llava_next_videos_stride(stride, side):
    layout = locate_in(*stub("llava_next_video", spatial_pool_stride=stride), [3 * side * side], 1, 3)
    assert layout.grids == [(3, side, side)]


@pytest.mark.parametrize(("found", "configured"), [p for p in product(POSITIONS, POSITIONS) if p[0] != p[1]])
def test_another_layout_than_the_configured_one_raises(found, configured):
    grid = (2, 3, 3)
    adapter, model = stub(mm_newline_position=configured)
    with pytest.raises(ValueError, match=rf"mm_newline_position is '{configured}'.*layout '{found}'"):
        locate_in(adapter, model, [len(walk(grid, found))], 1, 2)


def test_equal_layouts_do_not_contradict_one_another():
    adapter, model = stub(mm_newline_position="one_token")
    assert locate_in(adapter, model, [10], 1, 1).newline_spans == [9]  # of one frame
    adapter, model = stub(patches=1, mm_newline_position="grid")
    assert locate_in(adapter, model, [6], 1, 3).newline_spans == [1]  # of one row


def test_what_fits_no_layout_raises():
    adapter, model = stub()
    expected = (
        r"14 video placeholders for 1 videos of 2 frames; expected, by where newline tokens stand: of 3 x 3 tokens, "
        r"24 \(grid\), 20 \(frame\), 19 \(one_token\), 18 \(no_token\); of 5 x 5 tokens, "
        r"60 \(grid\), 52 \(frame\), 51 \(one_token\), 50 \(no_token\)$"
    )
    with pytest.raises(ValueError, match=expected):
        locate_in(adapter, model, [14], 1, 2)
    with pytest.raises(ValueError, match=r"50 video placeholders .*: of 2 x 2 tokens, 12 \(grid\), [^;]*$"):
        locate_in(*stub("llava_next_video"), [50], 1, 2)  # which nobody makes write its grid before pooling
    with pytest.raises(ValueError, match="sample 0 has 21 video placeholders"):
        locate_in(adapter, model, [21, 17], 2, 2)  # 2 * 19 in all
    with pytest.raises(ValueError, match=r"\[V, F, C, H, W\], got \[2, 3, 1, 1\]"):
        locate_in(adapter, model, [19], 1, 2, pixel_values_videos=torch.empty(2, 3, 1, 1))
    adapter, model = stub(mm_newline_position="everywhere")
    with pytest.raises(ValueError, match=r"mm_newline_position must be one of grid, .*, got 'everywhere'"):
        locate_in(adapter, model, [19], 1, 2)


def encoded(videos, tokens, frames, expand=1):
    features = SimpleNamespace(
        pooler_output=torch.empty(videos * expand, tokens, 8), last_hidden_state=torch.empty(videos * frames, 25, 8)
    )
    return {"mm_encoder_outputs": {"video": features}}


def test_encoded_videos_are_counted_by_the_frames_of_the_vision_tower():
    adapter, model = stub()
    for position, expand in product(POSITIONS, (1, 3)):
        count = len(walk((4, 3, 3), position))
        layout = locate_in(adapter, model, [2 * count, count], 0, 0, **encoded(3, count, 4, expand))
        assert layout.grids == [(4, 3, 3)] * 3
        assert layout.newline_spans == [span_of((4, 3, 3), position)] * 3
    features = encoded(1, 37, 4)
    del features["mm_encoder_outputs"]["video"].last_hidden_state
    with pytest.raises(ValueError, match="can't be counted without pixel_values_videos: give them, or"):
        locate_in(adapter, model, [37], 0, 0, **features)
    for count, frames in ((38, 4), (74, 7)):  # of no whole number of videos, and two with seven frames together
        features = encoded(1, 37, frames)
        with pytest.raises(ValueError, match=rf"{count} video placeholders.*{frames} frames in videos of 37 tokens"):
            locate_in(adapter, model, [count], 0, 0, **features)
    assert adapter.has_video_features(encoded(1, 37, 4))
    assert not adapter.has_video_features({"mm_encoder_outputs": {}})


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
@pytest.mark.parametrize("method", [Uniform(0.2), Random(max_tokens=9)], ids=["uniform", "random"])
def test_a_report_counts_newlines(family, method):
    """With fewer tokens than rows, most newlines go."""
    model, batch = family.build_model(), family.inputs(*family.prompts["several"])
    with qts_video.attach(model, method) as handle, torch.no_grad():
        logits = model(**batch).logits
    report = handle.last
    area = 4 if family is NEXT else 9
    newlines = {"llava_onevision grid": 9, "llava_onevision frame": 3, "llava_onevision": 1}.get(family.name, 0)
    position = {9: "grid", 3: "frame", 1: "one_token", 0: "no_token"}[newlines]
    kept = []
    for video in report.videos:
        bound = resolve_budget(3 * area + newlines, method.retention_ratio, method.max_tokens)
        assert (video.total, video.newlines) == (3 * area + newlines, newlines)
        assert video.kept == cost(video.grid, position, video.indices.tolist()) in (bound, bound - 1)
        assert video.kept_newlines == video.kept - len(video.indices)
        kept.append(video.indices + 3 * area * len(kept))
    assert report.total == 3 * (3 * area + newlines)
    assert report.kept == sum(video.kept for video in report.videos)
    keep = keep_mask(model, batch, torch.cat(kept))
    wanted = Oracle(model, batch, keep).logits()
    for ours, theirs in zip(rows(logits, report.columns >= 0), rows(wanted, keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_beams_with_one_video_a_sample(family):
    """On every version: two videos of a sample are repeated in the wrong order before transformers 5.18."""
    model = family.build_model()
    batch = family.inputs(prompt(user(Video(3), [30, 31])), prompt(user([33], Video(3), [34])))
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 3}
    with qts_video.attach(model, Keep(every(5))) as handle:
        ours = model.generate(**batch, **options)
    assert handle.last.kept < handle.last.total
    for sample, video in enumerate(handle.last.videos):
        valid = batch["attention_mask"][sample] == 1
        alone = {name: batch[name][sample][valid][None] for name in ("input_ids", "attention_mask")}
        alone["pixel_values_videos"] = batch["pixel_values_videos"][sample : sample + 1]
        with qts_video.attach(model, Keep(lambda _, tokens=video.indices: [tokens])):
            assert torch.equal(model.generate(**alone, **options)[0, -3:], ours[sample, -3:])


@pytest.mark.skipif(VERSION < (5, 18), reason="mm_encoder_outputs came with transformers 5.18")
@pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])
def test_videos_that_were_encoded_before(family):
    model, batch = family.build_model(), family.inputs(prompt(user(Video(3), [30], Video(3), [31])))
    pixels = batch.pop("pixel_values_videos")
    with qts_video.attach(model, Keep(every(2))) as handle, torch.no_grad():
        logits = model(**batch, pixel_values_videos=pixels).logits
        features = model.model.get_video_features(pixels, return_dict=True)
        assert torch.equal(model(**batch, mm_encoder_outputs={"video": features}).logits, logits)
        generated = model.generate(**batch, pixel_values_videos=pixels, max_new_tokens=3, do_sample=False, num_beams=2)
        again = model.generate(
            **batch, mm_encoder_outputs={"video": features}, max_new_tokens=3, do_sample=False, num_beams=2
        )
        assert torch.equal(again, generated)
        features.last_hidden_state = None
        with pytest.raises(ValueError, match="can't be counted"):
            model(**batch, mm_encoder_outputs={"video": features})
    assert len(handle.last.videos) == 2
