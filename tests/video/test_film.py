"""The demo's film shows what its description says, after encoding and decoding."""

import pytest

pytest.importorskip("av")

from qts_video.film import SECONDS, SQUARE_SHOWS, make_film
from qts_video.video import read_video


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return read_video(make_film(tmp_path_factory.mktemp("film") / "film.mp4"), fps=1)


def test_length(film):
    assert film.duration == pytest.approx(SECONDS)
    assert len(film.frames) == SECONDS
    assert film.notes == []


def test_red_circle_crosses_from_left_to_right(film):
    red, green, blue = film.frames.float().unbind(1)
    circle = (red > 150) & (green < 90) & (blue < 90)
    centres = [where.nonzero()[:, 1].float().mean().item() for where in circle]
    assert centres == sorted(centres)
    assert centres[0] < 0.15 * film.frames.shape[-1]
    assert centres[-1] > 0.8 * film.frames.shape[-1]


def test_blue_square_comes_and_goes(film):
    red, _, blue = film.frames.float().unbind(1)
    shows = ((blue > 150) & (red < 90)).flatten(1).sum(1) > 500
    expected = [SQUARE_SHOWS[0] <= at < SQUARE_SHOWS[1] for at in film.seconds]
    assert shows.tolist() == expected
    assert any(expected)
    assert not all(expected)
