"""Where in a video frames are taken, and where videos are found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video.clips import level, write_clip

pytest.importorskip("transformers")

from qts_video.data.media import find_media, places
from qts_video.video import read_video, sample


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """36 frames, 12 a second."""
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", frames=36, rate=12)


def shown(video):
    """Which frames of ``clip``, by their colour."""
    grey = video.frames.float().mean((1, 2, 3))
    levels = np.array([level(i) for i in range(28)])
    return [int(abs(levels - float(value)).argmin()) for value in grey]


def test_middle_of_every_stretch(clip):
    video = read_video(clip, fps=2, within_step=places("middle", 0, 0, ""))
    assert video.frame_indices == [3, 9, 15, 21, 27, 33]
    assert shown(video)[:4] == [3, 9, 15, 21]
    assert video.seconds == pytest.approx([i / 12 for i in video.frame_indices], abs=1e-3)
    assert video.sampled_fps == pytest.approx(2, rel=1e-3)
    fewer = read_video(clip, fps=2, max_frames=3, within_step=places("middle", 0, 0, ""))
    assert (fewer.frame_indices, fewer.sampled_fps) == ([6, 18, 30], pytest.approx(1, rel=1e-3))


def test_random_is_of_the_seed_the_epoch_and_the_sample(clip):
    def indices(*key):
        return read_video(clip, fps=2, within_step=places("random", *key)).frame_indices

    first = indices(0, 0, "a")
    assert first == indices(0, 0, "a")
    assert [index // 6 for index in first] == list(range(6))
    others = [indices(1, 0, "a"), indices(0, 1, "a"), indices(0, 0, "b")]
    assert len({tuple(found) for found in (first, *others)}) == 4


def test_a_folder_of_frames(tmp_path):
    for number in range(8):
        Image.new("RGB", (32, 32), (level(number),) * 3).save(tmp_path / f"{number}.png")
    video = read_video(tmp_path, fps=1, frame_rate=2, within_step=places("middle", 0, 0, ""))
    assert video.frame_indices == [1, 3, 5, 7]


@given(
    times=st.lists(st.floats(0, 100, allow_nan=False), min_size=1, max_size=40).map(sorted),
    fps=st.floats(0.1, 50),
    bounds=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 5),
)
def test_one_sample_a_stretch(times, fps, bounds, seed):
    times = np.array(times) - times[0]
    uniform = sample(times, fps, *bounds)
    drawn = sample(times, fps, *bounds, places("random", seed, 0, ""))
    assert len(drawn.indices) == len(uniform.indices)
    assert (np.diff(drawn.indices) >= 0).all()
    assert (np.diff(drawn.targets) >= 0).all()
    assert (drawn.indices >= 0).all()
    assert (drawn.indices < len(times)).all()
    assert (times[drawn.indices] <= drawn.targets).all()


def test_the_last_moment_is_inside_of_the_video():
    drawn = sample(np.arange(5) / 5, 5, 1, 99, lambda n: np.full(n, 0.999))
    assert drawn.indices.tolist() == [0, 1, 2, 3, 4]


def test_qwen_vl_utils_chooses_by_itself(clip):
    with pytest.raises(ValueError, match="within_step needs the reader pyav"):
        read_video(clip, reader="qwen-vl-utils", within_step=places("middle", 0, 0, ""))


def test_media_are_found(tmp_path):
    (tmp_path / "frames").mkdir()
    (tmp_path / "v_1.5.mkv").touch()
    (tmp_path / "a.mp4").touch()
    (tmp_path / "a.gif").touch()
    assert find_media(tmp_path, "frames") == tmp_path / "frames"
    assert find_media(tmp_path, "v_1.5") == tmp_path / "v_1.5.mkv"
    assert find_media(tmp_path, "a") == tmp_path / "a.mp4"
    assert find_media(tmp_path, "a.gif") == tmp_path / "a.gif"
    assert find_media(tmp_path / "elsewhere", str(tmp_path / "a")) == tmp_path / "a.mp4"
    assert find_media(tmp_path, "b") is None
