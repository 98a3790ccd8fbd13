"""The picture shows what the report says."""

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from PIL import Image
from qts_video.dropin.report import VideoReport
from qts_video.overlay import _light, draw_selection, steps_shown


def report(grid, indices, scores=True, step=0.5) -> VideoReport:
    steps, rows, columns = grid
    indices = torch.tensor(indices)
    frame = indices // (rows * columns)
    return VideoReport(
        sample=0,
        grid=grid,
        indices=indices,
        frame=frame,
        row=indices // columns % rows,
        column=indices % columns,
        seconds=frame * step,
        frame_seconds=torch.arange(steps) * step,
        scores=torch.rand(steps * rows * columns) if scores else None,
    )


def test_kept_tokens_are_untouched_and_the_rest_lie_in_haze():
    frame = np.random.default_rng(0).integers(0, 255, (30, 50, 3)).astype(np.uint8)
    kept = np.zeros((3, 5), bool)
    kept[1, 2] = kept[2, 4] = True
    lit = _light(frame, kept)
    for row in range(3):
        for column in range(5):
            block = np.s_[10 * row : 10 * row + 10, 10 * column : 10 * column + 10]
            if kept[row, column]:
                np.testing.assert_array_equal(lit[block], frame[block])
            else:
                assert lit[block].std() < 0.4 * frame[block].std()
                assert lit[block].min() > 60
                assert lit[block].max() < 155


def test_sizes_that_do_not_divide():
    lit = _light(np.full((31, 47, 3), 200, np.uint8), np.eye(3, dtype=bool))
    assert lit.shape == (31, 47, 3)
    assert lit[0, 0, 0] == lit[-1, -1, 0] == 200
    assert lit[0, -1, 0] < 150


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize(
    ("grid", "frames", "size"),
    [
        ((6, 4, 7), 12, (56, 98)),
        ((3, 7, 4), 5, (98, 56)),
        ((1, 2, 2), 1, (28, 28)),
        ((40, 2, 3), 80, (28, 42)),
    ],
)
def test_draws_every_shape(tmp_path, grid, frames, size, scores):
    pictures = torch.randint(0, 255, (frames, 3, *size), dtype=torch.uint8)
    path = draw_selection(
        tmp_path / "new" / "a.png",
        pictures,
        report(grid, [0, 3], scores),
        title="A question that is long enough to be wrapped " * 6,
        subtitle="kept 2",
    )
    with Image.open(path) as image:
        assert image.width == 1500
        assert image.height < 3000


def test_the_kept_token_is_where_the_light_is(tmp_path):
    """One step, white frames, one kept token: the only white block lies right of the middle of its panel."""
    white = torch.full((2, 3, 56, 112), 255, dtype=torch.uint8)
    path = draw_selection(tmp_path / "a.png", white, report((1, 2, 4), [2], scores=False), title="t")
    picture = np.asarray(Image.open(path).convert("L")).astype(int)
    dark = (picture > 145) & (picture < 157)
    rows, columns = np.where(dark.sum(axis=1) > 200)[0], np.where(dark.sum(axis=0) > 50)[0]
    panel = picture[rows[0] : rows[-1], columns[0] : columns[-1]]
    height, width = panel.shape
    light = panel > 250
    assert light[8 : height // 2 - 8, width // 2 + 8 : 3 * width // 4 - 8].all()
    assert not light[height // 2 + 8 :].any()
    assert not light[:, : width // 2 - 8].any()


def test_pictures_show_what_the_processor_cuts_out():
    from types import SimpleNamespace

    from qts_video.answer import seen_frames

    frames = torch.arange(2 * 3 * 4 * 8).view(2, 3, 4, 8)
    whole = SimpleNamespace(video_processor=SimpleNamespace(do_center_crop=False))
    centre = SimpleNamespace(video_processor=SimpleNamespace(do_center_crop=True))
    assert seen_frames(whole, frames) is frames
    assert torch.equal(seen_frames(centre, frames), frames[..., 2:6])
    assert torch.equal(seen_frames(centre, frames.transpose(2, 3)), frames.transpose(2, 3)[:, :, 2:6])


def test_of_every_stretch_the_most_relevant_step_is_shown():
    scores = np.zeros((9, 2, 2))
    scores[1, 0, 1], scores[2, 1, 1], scores[8, 0, 0], scores[4] = 0.2, 0.3, 0.1, np.nan
    assert steps_shown(9, 3, scores).tolist() == [2, 3, 8]
    assert steps_shown(9, 9, scores).tolist() == list(range(9))
    assert steps_shown(9, 3, None).tolist() == [0, 4, 8]
