"""A haystack and the needles that are planted in it, to see which layer finds them."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qts_video.video import Video, VideoError

# None of them is in the demo's film, which is the haystack.
SHAPES = {
    "triangle": [(0.5, 0.05), (0.95, 0.9), (0.05, 0.9)],
    "diamond": [(0.5, 0.02), (0.98, 0.5), (0.5, 0.98), (0.02, 0.5)],
    "cross": [
        *[(0.35, 0.05), (0.65, 0.05), (0.65, 0.35), (0.95, 0.35), (0.95, 0.65), (0.65, 0.65)],
        *[(0.65, 0.95), (0.35, 0.95), (0.35, 0.65), (0.05, 0.65), (0.05, 0.35), (0.35, 0.35)],
    ],
}
COLOURS = {"yellow": (250, 220, 30), "purple": (140, 50, 190), "orange": (250, 140, 20), "green": (30, 160, 70)}
PAPERS = ((255, 255, 255), (12, 12, 12))


def make_needle(height: int, width: int, chance: random.Random) -> tuple[torch.Tensor, str]:
    """A frame [3, height, width] uint8 filled by a shape in one colour, and a question about it."""
    from PIL import Image, ImageDraw

    shape, colour = chance.choice(sorted(SHAPES)), chance.choice(sorted(COLOURS))
    side = 0.9 * min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    image = Image.new("RGB", (width, height), chance.choice(PAPERS))
    points = [(left + side * x, top + side * y) for x, y in SHAPES[shape]]
    ImageDraw.Draw(image).polygon(points, fill=COLOURS[colour])
    return _tensor(image), f"Which colour is the {shape}?"


def read_needle(path: str | Path, height: int, width: int) -> torch.Tensor:
    """The picture at ``path`` as a frame [3, height, width] uint8, between bars where its shape is another.

    Raises:
        VideoError: no such file, or no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise VideoError(f"needle {path}: no such file") from error
    except OSError as error:
        raise VideoError(f"needle {path}: not a picture") from error
    return _tensor(ImageOps.pad(upright, (width, height)))


def plant(video: Video, needle: torch.Tensor, step: int, frames_per_step: int) -> Video:
    """``video`` with every frame of a step of its token grid replaced by ``needle`` [3, H, W]."""
    frames = video.frames.clone()
    frames[step * frames_per_step : (step + 1) * frames_per_step] = needle.to(frames)
    return dataclasses.replace(video, frames=frames)


def step_at(video: Video, seconds: float, frames_per_step: int) -> int:
    """The step of the token grid that shows at ``seconds``.

    Raises:
        ValueError: the video is not that long.
    """
    if not 0 <= seconds < max(video.duration, video.seconds[-1]):
        raise ValueError(f"--at {seconds:g}: {video.source} has {video.duration:.1f} seconds")
    frame = int(np.searchsorted(video.seconds, seconds, side="right")) - 1
    return max(frame, 0) // frames_per_step


def frames_per_step(processor: Any) -> int:
    """Frames that the model's processor joins in one step of the token grid."""
    return getattr(getattr(processor, "video_processor", None), "temporal_patch_size", None) or 1


def _tensor(image: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
