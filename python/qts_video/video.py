"""Read a video, a folder of frames or a URL into sampled RGB frames, each with its time in seconds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

READERS = ("auto", "pyav", "qwen-vl-utils")


class VideoError(Exception):
    """The video cannot be read. The message is one line that names the file and the reason."""


@dataclass
class Video:
    """Frames sampled from a video, upright, 8-bit RGB."""

    frames: torch.Tensor
    """[T, 3, H, W] uint8 (float32 in 0..255 from the qwen-vl-utils reader)."""
    seconds: list[float]
    """[T] time of each frame in seconds from the video's first frame, ascending: its presentation time. Where
    a frame stays on the screen over several samples, its repeats carry the moments of sampling."""
    sampled_fps: float
    """Sampled frames a second: what ``second_per_grid_ts`` is computed from."""
    frame_indices: list[int]
    """[T] which frame of the video each one is, in presentation order."""
    total_frames: int
    """Frames in the whole video."""
    duration: float
    """Seconds from the first frame to the end of the last."""
    source: str
    backend: str
    notes: list[str] = field(default_factory=list)
    """What was done to the picture beyond decoding, and what could not be read: one line each, for people."""

    def metadata(self) -> dict[str, Any]:
        """The fields of transformers' ``VideoMetadata``.

        ``fps`` is stated such that ``len(frames_indices) / total_num_frames * fps``, from which the
        Qwen2.5-VL processor computes the seconds that a grid step spans, is exactly ``sampled_fps``.
        """
        return {
            "total_num_frames": self.total_frames,
            "fps": self.sampled_fps * self.total_frames / len(self.frame_indices),
            "width": self.frames.shape[-1],
            "height": self.frames.shape[-2],
            "duration": self.duration,
            "video_backend": self.backend,
            "frames_indices": list(self.frame_indices),
        }


def read_video(
    source: str | Path,
    *,
    fps: float = 2.0,
    min_frames: int = 4,
    max_frames: int = 768,
    max_pixels: int | None = None,
    total_pixels: int | None = None,
    frame_rate: float | None = None,
    within_step: Callable[[int], np.ndarray] | None = None,
    reader: str = "auto",
    progress: bool = False,
) -> Video:
    """Sample ``source`` at ``fps`` frames a second of its own presentation time.

    Args:
        source: a video file, a URL that FFmpeg opens, or a folder of images (ordered naturally: 2 before 10).
        fps: sampled frames a second; lowered to the video's own rate where that is lower.
        min_frames, max_frames: bounds on the number of samples, which are then spread evenly over the video.
            ``min_frames`` never asks for more samples than the video has frames; ``max_frames`` wins over it.
        max_pixels: larger frames are shrunk to this many pixels while decoding, aspect ratio kept.
        total_pixels: the same bound on all sampled frames together.
        frame_rate: frames a second at which a folder's images were taken. None: ``fps``, all images are used.
        within_step: None looks at the start of every step, and at both ends where ``min_frames`` or ``max_frames``
            decide. Else the same number n of samples is taken from n equal stretches of the video, and this function of
            n says where in them: [n] in [0, 1).
        reader: "pyav" samples by time stamps and holds nothing but the sampled frames in memory;
            "qwen-vl-utils" goes through ``process_vision_info`` (frame numbers, its own resizing), to
            reproduce results obtained with it; "auto" is PyAV, or qwen-vl-utils where PyAV is not installed.
        progress: a progress bar on stderr when decoding takes longer than a second.

    Raises:
        VideoError: no such file, not a video, sound alone, an empty folder, nothing that decodes.
        ValueError: an argument out of range.
    """
    _check_arguments(fps, min_frames, max_frames, max_pixels, total_pixels, frame_rate, reader)
    remote = "://" in str(source)
    if not remote and not Path(source).exists():
        raise VideoError(f"{source}: no such file or folder")
    limits = Limits(max_pixels, total_pixels)
    if not remote and Path(source).is_dir():
        from . import _frames

        return _frames.read_folder(Path(source), fps, min_frames, max_frames, limits, frame_rate, within_step)
    if reader == "qwen-vl-utils" or (reader == "auto" and not _has_pyav()):
        if within_step is not None:
            raise ValueError("within_step needs the reader pyav: qwen-vl-utils chooses its frames itself")
        from . import _frames

        return _frames.read_with_qwen_vl_utils(str(source), fps, min_frames, max_frames, limits)
    if not _has_pyav():
        raise VideoError(f"{source}: reading videos needs PyAV: pip install av")
    from . import _pyav

    return _pyav.read_file(str(source), fps, min_frames, max_frames, limits, progress, within_step)


@dataclass(frozen=True)
class Limits:
    """Bounds on the size of sampled frames, in pixels."""

    max_pixels: int | None = None
    total_pixels: int | None = None

    def fit(self, height: int, width: int, num_frames: int, multiple: int = 28) -> tuple[int, int]:
        """(height, width) within the bounds; multiples of ``multiple`` where shrinking was needed."""
        bounds = [self.max_pixels] if self.max_pixels else []
        if self.total_pixels:
            bounds.append(self.total_pixels // num_frames)
        if not bounds or height * width <= min(bounds):
            return height, width
        shrink = math.sqrt(height * width / min(bounds))
        return (
            max(multiple, math.floor(height / shrink / multiple) * multiple),
            max(multiple, math.floor(width / shrink / multiple) * multiple),
        )


@dataclass(frozen=True)
class Samples:
    """Which frames to take. All arrays are [T]."""

    indices: np.ndarray
    """int64, into the frames in presentation order; non-decreasing."""
    targets: np.ndarray
    """float64, the moments at which the screen is looked at, in seconds, ascending."""
    fps: float

    def first(self, n: int) -> "Samples":
        """The first n of them."""
        return Samples(self.indices[:n], self.targets[:n], self.fps)


def sample(
    times: np.ndarray,
    fps: float,
    min_frames: int,
    max_frames: int,
    within_step: Callable[[int], np.ndarray] | None = None,
) -> Samples:
    """Look at the screen every 1/fps seconds: sample k is the frame that is shown at k/fps.

    Args:
        times: [N] seconds from the first frame, ascending, N >= 1.
        within_step: see ``read_video``.

    The step is never shorter than the video's usual distance between frames: a video with a low constant
    frame rate gives no frame twice, while a still stretch of a video with a variable rate does. A frame
    counts as shown from half that distance before its time, so that rounded time stamps do not slip by one
    frame.
    """
    count, last = len(times), float(times[-1])
    gap = _usual_gap(times)
    step = max(1.0 / fps, gap)
    n = math.floor((last + gap / 2) / step) + 1
    bounded = min(max(n, min(min_frames, count)), max_frames)
    if within_step is not None:
        step = (last + gap) / bounded
        targets = np.minimum((np.arange(bounded) + within_step(bounded)) * step, last)
    elif bounded != n:
        targets = np.linspace(0.0, last, bounded)
        step = last / (bounded - 1) if bounded > 1 else step
    else:
        targets = np.arange(n) * step
    slack = gap / 2 if within_step is None else 0.0  # a moment that is drawn is no time stamp
    indices = np.searchsorted(times, targets + slack, side="right") - 1
    return Samples(indices=indices, targets=targets, fps=1.0 / step if step > 0 else fps)


def sampled_seconds(times: np.ndarray, samples: Samples) -> list[float]:
    """The time of each sample: of its frame, or the moment of sampling where the frame was already taken.

    Never descends: in a damaged file the times of what decodes may run backwards.
    """
    repeats = np.diff(samples.indices, prepend=-1) == 0
    return np.maximum.accumulate(np.where(repeats, samples.targets, times[samples.indices])).tolist()


def _usual_gap(times: np.ndarray) -> float:
    """Seconds between neighbouring frames: the median, or the mean where they agree (stamps are rounded)."""
    if len(times) < 2:
        return 0.0
    median = float(np.median(np.diff(times)))
    mean = float(times[-1] - times[0]) / (len(times) - 1)
    return mean if abs(mean - median) <= 0.1 * median else median


def _check_arguments(
    fps: float,
    min_frames: int,
    max_frames: int,
    max_pixels: int | None,
    total_pixels: int | None,
    frame_rate: float | None,
    reader: str,
) -> None:
    for name, value in (("fps", fps), ("frame_rate", frame_rate)):
        if value is not None and not (0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number of frames a second, got {value}")
    bounds = {
        "min_frames": min_frames,
        "max_frames": max_frames,
        "max_pixels": max_pixels,
        "total_pixels": total_pixels,
    }
    for name, value in bounds.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if reader not in READERS:
        raise ValueError(f"reader must be one of {', '.join(READERS)}, got {reader!r}")


def _has_pyav() -> bool:
    from importlib.util import find_spec

    return find_spec("av") is not None
