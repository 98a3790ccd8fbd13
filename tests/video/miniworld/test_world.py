"""Films are drawn as they are told, and every question has the answer that the film shows."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qts_video.miniworld.questions import KINDS, all_questions, sample_questions
from qts_video.miniworld.render import NOISE, STAMP, cells, masks, render
from qts_video.miniworld.world import (
    CELL,
    COLOURS,
    COUNTS,
    DIRECTIONS,
    LONGEST,
    SHAPES,
    SIDE,
    SLOT,
    SPLITS,
    Shape,
    sample_scene,
)

scenes = st.builds(sample_scene, st.sampled_from(list(SPLITS)), st.integers(0, 10**6), st.integers(SLOT, LONGEST))


@settings(max_examples=60, deadline=None)
@given(scenes)
def test_a_scene_keeps_its_promises(scene):
    assert scene == sample_scene(scene.split, scene.number, scene.seconds)
    starts = [shape.start for shape in scene.shapes]
    assert starts == sorted(set(starts))
    assert all(start % SLOT == 0 for start in starts)
    assert max(Counter(shape.colour for shape in scene.shapes).values()) <= len(COUNTS)
    for shape in scene.shapes:
        assert shape.start + shape.seconds <= scene.seconds
        for moment in np.arange(shape.start, shape.start + shape.seconds, 0.125):
            x, y = shape.centre(moment)
            assert min(x, y) >= STAMP // 2
            assert max(x, y) <= SIDE - STAMP // 2
        assert shape.centre(shape.start - 0.01) is None
        assert shape.centre(shape.start + shape.seconds) is None
    assert any(all_questions(scene).values())


def test_splits_and_lengths_never_share_a_film():
    drawn = {
        sample_scene(split, number, seconds).random(0).integers(2**63)
        for split in SPLITS
        for number in range(20)
        for seconds in (8, 12)
    }
    assert len(drawn) == len(SPLITS) * 20 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("exam", 0, 8), "split must be one of train, validation, test, got 'exam'"),
        (("test", -1, 8), "expected number >= 0 and 4 <= seconds <= 120, got -1 and 8"),
        (("test", 0, 3), "got 0 and 3"),
        (("test", 0, 8, 3), "expected 1 to 2 shapes in 8 s, got 3"),
    ],
)
def test_a_scene_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_scene(*arguments)


def colour_distance(frames, colour):
    return np.abs(frames.astype(int) - np.array(COLOURS[colour])).max(-1)


@settings(max_examples=15, deadline=None)
@given(scenes)
def test_a_shape_is_seen_where_and_when_it_is_told(scene):
    scene = replace(scene, seconds=min(scene.seconds, 24), shapes=tuple(s for s in scene.shapes if s.start < 20))
    frames = render(scene)
    assert frames.shape == (2 * scene.seconds, SIDE, SIDE, 3)
    assert frames.dtype == np.uint8
    for shape in scene.shapes:
        drawn = colour_distance(frames, shape.colour) == 0
        area = masks()[SHAPES.index(shape.shape)].sum()
        for number, frame in enumerate(drawn):
            centre = shape.centre(number / 2)
            if centre is None:
                continue
            rows, columns = frame.nonzero()
            near = (abs(rows - centre[1]) <= STAMP // 2) & (abs(columns - centre[0]) <= STAMP // 2)
            assert area <= near.sum() <= area + 16 * 3  # specks may lie beside it


def test_cells_are_those_that_a_shape_covers():
    still = Shape("red", "square", "right", 4, 2, (14, 42), 0)
    assert cells(still).tolist() == [[4, 1, 0], [5, 1, 0]]
    moving = replace(still, speed=CELL // 2)  # in the first frame of a step in one cell, in its second in two
    assert cells(moving).tolist() == [[4, 1, 0], [4, 1, 1], [5, 1, 1], [5, 1, 2]]


@settings(max_examples=60, deadline=None)
@given(scenes)
def test_answers_are_exact(scene):
    shapes = scene.shapes
    for kind, questions in all_questions(scene).items():
        for question in questions:
            words = question.text.rstrip("?").split()
            assert question.kind == kind
            assert set(question.about) <= set(shapes)
            if kind == "colour":
                assert {s.colour for s in shapes if s.shape == words[-1]} == {question.answer}
            elif kind == "shape":
                assert {s.shape for s in shapes if s.colour == words[-1]} == {question.answer}
            elif kind == "order":
                first = [s.colour for s in shapes if s.colour in (words[3], words[5])]
                assert words[4] == "or"
                assert first[0] == question.answer
                assert len(first) == 2
            elif kind == "direction":
                (one,) = [s for s in shapes if s.colour == words[3]]
                (x0, y0), (x1, y1) = one.centre(one.start), one.centre(one.start + 1)
                assert DIRECTIONS[question.answer] == (np.sign(x1 - x0), np.sign(y1 - y0))
            elif kind == "second":
                (one,) = [s for s in shapes if s.colour == words[3]]
                assert int(question.answer) == one.start
            else:
                assert COUNTS.index(question.answer) + 1 == sum(s.colour == words[2] for s in shapes)


def test_questions_are_drawn_by_weight_and_from_the_seed():
    weights = dict.fromkeys(KINDS, 1.0) | {"order": 4.0, "shape": 0.0}
    films = [sample_scene("train", number, 30) for number in range(200)]
    films = [film for film in films if all(all_questions(film).values())]
    asked = [question for film in films for question in sample_questions(film, 8, weights)]
    share = Counter(question.kind for question in asked)
    assert set(share) == set(KINDS) - {"shape"}
    assert 0.4 < share["order"] / len(asked) < 0.6
    assert sample_questions(films[0], 8, weights) == sample_questions(films[0], 8, weights)


def test_noise_is_new_in_every_frame_and_the_scene_is_not():
    frames = render(sample_scene("test", 1, 8)).astype(int)
    still = np.median(frames, axis=0)
    spread = np.abs(frames - still)
    assert 0.15 * NOISE < spread.mean() < 0.4 * NOISE
    assert not np.array_equal(frames[0], frames[1])
