"""Reading videos as they come. Every clip shows which frame is which: times and contents are checked."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from qts_video.video import Limits, VideoError, read_video, sample
from video.clips import Pipe, level, set_display_matrix, write_clip, write_sound

av = pytest.importorskip("av")


def shown(video) -> list[int]:
    """Which frame each sample shows, read from its grey level."""
    greys = video.frames.float().mean(dim=(1, 2, 3))
    numbers = ((greys - 16) / 8).round().int().tolist()
    assert all(abs(grey - level(n)) < 3 for grey, n in zip(greys.tolist(), numbers, strict=True))
    return numbers


def assert_says(video, *times: float) -> None:
    np.testing.assert_allclose(video.seconds, times, atol=1.5e-3)


def test_constant_rate(tmp_path):
    video = read_video(write_clip(tmp_path / "a.mp4", frames=24, rate=12), fps=2, min_frames=1)
    assert video.frames.dtype == torch.uint8
    assert video.frames.shape == (4, 3, 48, 64)
    assert shown(video) == video.frame_indices == [0, 6, 12, 18]
    assert_says(video, 0.0, 0.5, 1.0, 1.5)
    assert (video.total_frames, video.sampled_fps) == (24, 2.0)
    assert video.duration == pytest.approx(2.0, abs=2e-3)
    assert video.notes == []


def test_variable_rate_is_sampled_by_time(tmp_path):
    """Eleven frames in the first half second, then a still picture, then one more frame."""
    times = [i * 0.05 for i in range(11)] + [2.6]
    video = read_video(write_clip(tmp_path / "a.mp4", times=times), fps=2, min_frames=1)
    assert shown(video) == video.frame_indices == [0, 10, 10, 10, 10, 10]
    assert_says(video, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    assert video.sampled_fps == 2.0


def test_low_rate_gives_no_frame_twice(tmp_path):
    video = read_video(write_clip(tmp_path / "a.mkv", frames=5, rate=1), fps=4)
    assert shown(video) == [0, 1, 2, 3, 4]
    assert_says(video, 0, 1, 2, 3, 4)
    assert video.sampled_fps == pytest.approx(1.0)


def test_rounded_time_stamps_do_not_slip(tmp_path):
    """30 frames a second in milliseconds: 0, 33, 67, 100, ..."""
    times = [round(i / 30, 3) for i in range(25)]
    video = read_video(write_clip(tmp_path / "a.mkv", times=times, rate=30), fps=30)
    assert shown(video) == list(range(25))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_start_time_is_not_zero(tmp_path, suffix):
    path = write_clip(tmp_path / f"a.{suffix}", times=[10 + i / 12 for i in range(24)])
    with av.open(str(path)) as container:
        assert container.streams.video[0].start_time > 0
    video = read_video(path, fps=2, min_frames=1)
    assert shown(video) == [0, 6, 12, 18]
    assert_says(video, 0.0, 0.5, 1.0, 1.5)


def test_no_duration_in_the_header(tmp_path):
    pipe = Pipe(tmp_path / "a.mkv")
    path = write_clip(tmp_path / "a.mkv", to=pipe, format="matroska", container_options={"live": "1"})
    pipe.close()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (container.duration, stream.duration, stream.frames) == (None, None, 0)
    video = read_video(path, fps=2, min_frames=1)
    assert shown(video) == [0, 6, 12, 18]
    assert video.total_frames == 24


def test_raw_stream_has_no_time_stamps(tmp_path):
    path = write_clip(tmp_path / "a.h264", frames=50, rate=25, bf="2")
    with av.open(str(path)) as container:
        assert {p.pts for p in container.demux(video=0)} == {None}
    video = read_video(path, fps=5, min_frames=1, max_frames=5)
    assert video.total_frames == 50
    assert shown(video) == [n % 28 for n in video.frame_indices] == [0, 12, 25 % 28, 37 % 28, 49 % 28]


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), "rgbw"),
        ((0, 1, -1, 0), "brwg"),  # a phone held upright: a quarter turn clockwise
        ((-1, 0, 0, -1), "wbgr"),
        ((0, -1, 1, 0), "gwrb"),
        ((-1, 0, 0, 1), "grwb"),  # mirrored
        ((1, 0, 0, -1), "bwrg"),
        ((0, 1, 1, 0), "rbgw"),
        ((0, -1, -1, 0), "wgbr"),
    ],
)
def test_display_matrix(tmp_path, matrix, expected):
    """(a, b, c, d) of x' = a x + c y, y' = b x + d y; the corners of the upright picture in reading order."""
    path = write_clip(tmp_path / "a.mp4", frames=4, quarters=True, size=(64, 32))
    set_display_matrix(path, *matrix)
    video = read_video(path)
    assert any("upright" in note for note in video.notes) == (expected != "rgbw")
    rotation = 90 if matrix[0] == 0 else 0
    width, height = (32, 64) if rotation else (64, 32)
    assert video.frames.shape == (4, 3, height, width)
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    corners = [video.frames[0, :, y, x] for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    assert "".join(names[tuple((corner > 128).int().tolist())] for corner in corners) == expected


def test_odd_size(tmp_path):
    video = read_video(write_clip(tmp_path / "a.mkv", size=(97, 53), codec="ffv1", pix_fmt="yuv444p"))
    assert video.frames.shape[-2:] == (53, 97)
    assert shown(video)[0] == 0


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv422p10le", "yuv444p", "gray"])
def test_pixel_formats(tmp_path, pix_fmt):
    codec = "ffv1" if pix_fmt == "gray" else "libx264"
    video = read_video(write_clip(tmp_path / "a.mkv", pix_fmt=pix_fmt, codec=codec), fps=2, min_frames=1)
    assert video.frames.dtype == torch.uint8
    assert shown(video) == [0, 6, 12, 18]
    assert any("10 to 8 bits" in note for note in video.notes) == ("10" in pix_fmt)


def test_hdr_is_named(tmp_path):
    path = write_clip(tmp_path / "a.mkv", pix_fmt="yuv420p10le", **{"x264-params": "transfer=smpte2084"})
    assert any("HDR (PQ)" in note and "no tone mapping" in note for note in read_video(path).notes)


def test_pixels_that_are_not_square(tmp_path):
    path = write_clip(tmp_path / "a.mp4", aspect=Fraction(2, 1))
    video = read_video(path)
    assert video.frames.shape[-2:] == (48, 128)
    assert any("not square" in note for note in video.notes)


def test_two_video_streams_takes_the_film_not_the_cover(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        small, large = (container.add_stream("libx264", rate=12) for _ in range(2))
        small.width, small.height, small.pix_fmt = 32, 32, "yuv420p"
        large.width, large.height, large.pix_fmt = 128, 96, "yuv420p"
        noise = np.random.default_rng(0)
        for number in range(12):
            for stream in (small, large):
                image = noise.integers(0, 255, (stream.height, stream.width, 3), np.uint8)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in (small, large):
            container.mux(stream.encode())
    assert read_video(path).frames.shape[-2:] == (96, 128)


def test_frame_bounds_spread_over_the_whole_video(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=25, rate=12)
    assert read_video(path, fps=12, max_frames=3).frame_indices == [0, 12, 24]
    assert len(read_video(path, fps=0.1, min_frames=4).frames) == 4
    assert read_video(path, fps=12, min_frames=1, max_frames=1).frame_indices == [0]


def test_min_frames_never_repeats_frames(tmp_path):
    video = read_video(write_clip(tmp_path / "a.mp4", frames=2), min_frames=8)
    assert shown(video) == [0, 1]


def test_one_frame(tmp_path):
    video = read_video(write_clip(tmp_path / "a.mp4", frames=1), fps=2)
    assert video.seconds == [0.0]
    assert video.sampled_fps == 2.0


def test_large_frames_shrink_while_decoding(tmp_path):
    path = write_clip(tmp_path / "a.mp4", size=(320, 240), quarters=True)
    video = read_video(path, max_pixels=120 * 90)
    assert video.frames.shape[-2:] == (84, 112)
    assert video.frames[0, :, 10, 10].argmax() == 0
    assert video.frames[0, :, 10, -10].argmax() == 1
    assert any("320x240 to 112x84" in note for note in video.notes)
    assert read_video(path, total_pixels=4 * 120 * 90).frames.shape == (4, 3, 84, 112)


def test_fit_keeps_what_is_small_enough():
    assert Limits(max_pixels=100 * 100).fit(90, 70, 4) == (90, 70)
    assert Limits(max_pixels=100 * 100).fit(200, 100, 4) == (140, 56)
    assert Limits(max_pixels=10).fit(200, 100, 4) == (28, 28)


def test_only_the_samples_are_kept(tmp_path):
    """600 frames, 3 samples: no more than a few decoded frames are alive at a time."""
    import tracemalloc

    path = write_clip(tmp_path / "a.mp4", frames=600, rate=60, size=(160, 120))
    tracemalloc.start()
    read_video(path, fps=60, max_frames=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * 160 * 120 * 3


def test_metadata_gives_the_processor_the_sampling_rate(tmp_path):
    video = read_video(write_clip(tmp_path / "a.mp4", frames=25, rate=12), fps=2)
    meta = video.metadata()
    assert len(meta["frames_indices"]) / meta["total_num_frames"] * meta["fps"] == pytest.approx(2.0)
    from transformers.video_utils import VideoMetadata

    assert VideoMetadata(**meta).total_num_frames == 25


class TestErrors:
    def fails(self, path, match):
        with pytest.raises(VideoError, match=match) as error:
            read_video(path)
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)

    def test_missing(self, tmp_path):
        self.fails(tmp_path / "none.mp4", "no such file")

    def test_sound_alone(self, tmp_path):
        self.fails(write_sound(tmp_path / "a.m4a"), "no video in this file .*audio")

    @pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.mkv"])
    def test_text(self, tmp_path, name):
        (tmp_path / name).write_text("This is not a video.\n" * 200)
        self.fails(tmp_path / name, "not a video")

    def test_zero_bytes(self, tmp_path):
        (tmp_path / "a.mp4").touch()
        self.fails(tmp_path / "a.mp4", "not a video")

    def test_truncated_before_the_index(self, tmp_path):
        whole = write_clip(tmp_path / "whole.mp4").read_bytes()
        (tmp_path / "a.mp4").write_bytes(whole[: whole.index(b"moov") - 4])
        self.fails(tmp_path / "a.mp4", "not a video")

    def test_nothing_decodes(self, tmp_path):
        data = bytearray(write_clip(tmp_path / "whole.mp4", frames=6).read_bytes())
        start = data.index(b"mdat") + 4
        end = data.index(b"moov") - 4
        data[start:end] = b"\xff" * (end - start)
        (tmp_path / "a.mp4").write_bytes(data)
        self.fails(tmp_path / "a.mp4", "no frame could be decoded|not a video")

    def test_empty_folder(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        self.fails(tmp_path, "no images")

    def test_damaged_image(self, tmp_path):
        (tmp_path / "1.png").write_bytes(b"\x89PNG nonsense")
        with pytest.raises(VideoError, match=r"1\.png: not an image"):
            read_video(tmp_path)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"fps": 0},
            {"fps": float("nan")},
            {"min_frames": 0},
            {"max_pixels": 0},
            {"frame_rate": -1},
            {"reader": "decord"},
        ],
    )
    def test_arguments(self, tmp_path, arguments):
        with pytest.raises(ValueError, match=r"got"):
            read_video(tmp_path, **arguments)


def test_truncated_stream_keeps_what_came(tmp_path):
    """The index stands in front and the pictures end half-way: what exists is given, the loss is told."""
    path = write_clip(
        tmp_path / "whole.mp4",
        frames=120,
        size=(320, 240),
        g="12",
        quarters=True,
        container_options={"movflags": "faststart"},
    )
    whole = path.read_bytes()
    assert whole.index(b"moov") < whole.index(b"mdat")
    cut = tmp_path / "a.mp4"
    cut.write_bytes(whole[: (len(whole) + whole.index(b"mdat")) // 2])
    video = read_video(cut, fps=2)
    assert 4 <= len(video.frames) < 20
    assert len(video.frames) == len(video.seconds) == len(video.frame_indices)
    assert any(re.fullmatch(r"damaged: \d.\d s of 10.0 s are in the file", note) for note in video.notes)


class TestFolder:
    def write(self, folder, names, size=(40, 30), mode="RGB"):
        from PIL import Image

        for number, name in enumerate(names):
            Image.new("L", size, level(number)).convert(mode).save(folder / name)

    def test_natural_order_and_other_files(self, tmp_path):
        self.write(tmp_path, [f"frame_{i}.png" for i in range(12)])
        (tmp_path / "readme.txt").write_text("not a frame")
        video = read_video(tmp_path, fps=2)
        assert shown(video) == list(range(12))
        assert_says(video, *(i / 2 for i in range(12)))

    def test_frame_rate(self, tmp_path):
        self.write(tmp_path, [f"{i:03d}.png" for i in range(24)])
        video = read_video(tmp_path, fps=2, frame_rate=8)
        assert shown(video) == [0, 4, 8, 12, 16, 20]
        assert_says(video, 0, 0.5, 1, 1.5, 2, 2.5)

    def test_sizes_are_brought_together(self, tmp_path):
        self.write(tmp_path, ["0.png"])
        self.write(tmp_path, ["1.png"], size=(80, 60))
        video = read_video(tmp_path)
        assert video.frames.shape == (2, 3, 30, 40)
        assert any("differ in size" in note for note in video.notes)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
    def test_modes(self, tmp_path, mode):
        self.write(tmp_path, ["0.png", "1.png"], mode=mode)
        assert shown(read_video(tmp_path)) == [0, 1]

    def test_sixteen_bits(self, tmp_path):
        from PIL import Image

        Image.fromarray(np.full((30, 40), level(3) << 8, np.uint16)).save(tmp_path / "0.png")
        assert shown(read_video(tmp_path)) == [3]

    def test_photographs_are_turned_upright(self, tmp_path):
        from PIL import Image

        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (40, 30)).save(tmp_path / "0.jpg", exif=exif)
        assert read_video(tmp_path).frames.shape[-2:] == (40, 30)


def test_qwen_vl_utils_failure_is_one_line(tmp_path):
    pytest.importorskip("qwen_vl_utils")
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(VideoError, match="qwen-vl-utils could not read it"):
        read_video(tmp_path / "a.mp4", reader="qwen-vl-utils")


def test_qwen_vl_utils_reader(tmp_path, monkeypatch):
    """Its video and metadata are taken as they are; the file readers behind it are optional packages."""
    qwen_vl_utils = pytest.importorskip("qwen_vl_utils")
    asked = {}

    def fetch(messages, **options):
        asked.update(messages[0]["content"][0])
        meta = {"fps": 12.0, "frames_indices": torch.tensor([0, 6]), "total_num_frames": 12}
        return None, [(torch.zeros(2, 3, 28, 56), meta)], {}

    monkeypatch.setattr(qwen_vl_utils, "process_vision_info", fetch)
    path = write_clip(tmp_path / "a.mp4")
    video = read_video(path, reader="qwen-vl-utils", fps=2, max_pixels=5000, max_frames=16)
    assert (asked["fps"], asked["max_pixels"], asked["max_frames"]) == (2, 5000, 16)
    assert video.seconds == [0.0, 0.5]
    assert video.sampled_fps == 2.0


@pytest.mark.parametrize("n", [1, 2, 3, 50])
@pytest.mark.parametrize("fps", [0.3, 2.0, 100.0])
def test_samples_are_bounded_and_ascending(n, fps):
    times = np.sort(np.random.default_rng(n).uniform(0, 20, n))
    times -= times[0]
    samples = sample(times, fps, 4, 16)
    assert min(4, n) <= len(samples.indices) <= 16
    assert (np.diff(samples.indices) >= 0).all()
    assert samples.indices.min() >= 0
    assert samples.indices.max() < n
    assert samples.fps > 0


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "h264"])
def test_damaged_files_give_frames_or_one_error(tmp_path, suffix):
    """Bytes flipped, cut off and missing: whatever is left is read in order, or refused in one line."""
    whole = write_clip(tmp_path / f"whole.{suffix}", frames=20, g="8").read_bytes()
    noise = np.random.default_rng(0)
    read = 0
    for number in range(25):
        data = np.frombuffer(whole, np.uint8).copy()
        hit = noise.integers(0, len(data), (1, 5, 40)[number % 3])
        data[hit] = noise.integers(0, 256, len(hit))
        if number % 4 == 0:
            data = data[: noise.integers(1, len(data))]
        if number % 5 == 0:
            data = data[noise.integers(0, len(data)) :]
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(data.tobytes())
        try:
            video = read_video(path)
        except VideoError:
            continue
        read += 1
        assert len(video.frames) == len(video.seconds) == len(video.frame_indices) > 0
        assert video.seconds[0] == 0.0
        assert video.seconds == sorted(video.seconds)
    assert 0 < read < 25


def test_titles_in_other_encodings(tmp_path):
    path = write_clip(tmp_path / "a.mkv", title="AAAA-title")
    data = path.read_bytes()
    assert b"AAAA-title" in data
    path.write_bytes(data.replace(b"AAAA-title", b"\xff\xfe\xc0\xe8-title"))
    assert len(read_video(path).frames) == 4
