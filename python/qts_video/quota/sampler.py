"""QuoTA's dynamic frame sampler: longer films give more frames."""

import math
from pathlib import Path
from typing import Any

from qts_video.video import Video, read_video

BASE_FRAMES, EXTRA_FRAMES_PER_HOUR = 96, 64


def number_of_frames(
    seconds: float,
    base_frames: int = BASE_FRAMES,
    extra_frames_per_hour: float = EXTRA_FRAMES_PER_HOUR,
    max_frames: int | None = None,
) -> int:
    """T = base_frames + int(extra_frames_per_hour * seconds / 3600), at most ``max_frames`` (arXiv 2503.08689).

    Raises:
        ValueError: a negative or infinite number of seconds or frames, or no frame at all.
    """
    for name, value in (("seconds", seconds), ("extra_frames_per_hour", extra_frames_per_hour)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    for name, value in (("base_frames", base_frames), ("max_frames", max_frames)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    frames = base_frames + int(extra_frames_per_hour * seconds / 3600)
    return frames if max_frames is None else min(frames, max_frames)


def read_sampled(
    source: str | Path,
    *,
    base_frames: int = BASE_FRAMES,
    extra_frames_per_hour: float = EXTRA_FRAMES_PER_HOUR,
    max_frames: int | None = None,
    **options: Any,
) -> Video:
    """``source`` as ``number_of_frames`` of its duration, spread evenly over it; all its frames where it has fewer.

    The duration is read from the time stamps of the packets; one frame is decoded for it.

    Args:
        source: see ``read_video``.
        base_frames, extra_frames_per_hour, max_frames: see ``number_of_frames``.
        options: the other arguments of ``read_video``, without ``min_frames``. ``fps`` matters for a folder alone,
            as the rate at which its images were taken.

    Raises:
        VideoError, ValueError: see ``read_video`` and ``number_of_frames``.
    """
    number_of_frames(0, base_frames, extra_frames_per_hour, max_frames)
    duration = read_video(source, **{**options, "progress": False}, min_frames=1, max_frames=1).duration
    frames = number_of_frames(duration, base_frames, extra_frames_per_hour, max_frames)
    return read_video(source, **options, min_frames=frames, max_frames=frames)
