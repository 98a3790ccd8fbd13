"""Frames from a folder of images, and from qwen-vl-utils."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .video import Limits, Video, VideoError, sample, sampled_seconds

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def read_folder(
    folder: Path,
    fps: float,
    min_frames: int,
    max_frames: int,
    limits: Limits,
    frame_rate: float | None = None,
    within_step: Callable[[int], np.ndarray] | None = None,
) -> Video:
    """See ``video.read_video``. All images are brought to the size of the first."""
    paths = sorted((p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=_natural)
    if not paths:
        raise VideoError(f"{folder}: no images in this folder ({' '.join(sorted(IMAGE_SUFFIXES))})")
    rate = frame_rate or fps
    times = np.arange(len(paths)) / rate
    samples = sample(times, fps, min_frames, max_frames, within_step)

    first = _open(paths[0])
    height, width = limits.fit(first.height, first.width, len(samples.indices))
    notes = []
    if (height, width) != (first.height, first.width):
        notes.append(f"resized from {first.width}x{first.height} to {width}x{height}")
    frames = np.empty((len(samples.indices), height, width, 3), np.uint8)
    for row, index in enumerate(samples.indices):
        image = _open(paths[index])
        if image.size != first.size and not notes:
            notes.append(f"images differ in size: all resized to {width}x{height}")
        frames[row] = np.asarray(image if image.size == (width, height) else image.resize((width, height)))
    return Video(
        frames=torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(),
        seconds=sampled_seconds(times, samples),
        sampled_fps=samples.fps,
        frame_indices=samples.indices.tolist(),
        total_frames=len(paths),
        duration=len(paths) / rate,
        source=str(folder),
        backend="pillow",
        notes=notes,
    )


def read_with_qwen_vl_utils(source: str, fps: float, min_frames: int, max_frames: int, limits: Limits) -> Video:
    """See ``video.read_video``. That package samples by frame number, at the average frame rate."""
    try:
        from qwen_vl_utils import process_vision_info
    except ImportError as error:
        raise VideoError(f"{source}: this reader needs qwen-vl-utils: pip install qwen-vl-utils") from error
    element = {
        "type": "video",
        "video": source,
        "fps": fps,
        "min_frames": min_frames,
        "max_frames": max_frames,
    }
    if limits.max_pixels:
        element["max_pixels"] = limits.max_pixels
    if limits.total_pixels:
        element["total_pixels"] = limits.total_pixels
    messages = [{"role": "user", "content": [element]}]
    try:
        _, videos, _ = process_vision_info(messages, return_video_kwargs=True, return_video_metadata=True)
    except Exception as error:  # Its readers raise whatever decord, torchcodec and torchvision raise.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise VideoError(f"{source}: qwen-vl-utils could not read it ({type(error).__name__}: {reason})") from error
    frames, metadata = videos[0]
    indices = [int(i) for i in metadata["frames_indices"]]
    rate, total = float(metadata["fps"]), int(metadata["total_num_frames"])
    return Video(
        frames=frames,
        seconds=[i / rate for i in indices],
        sampled_fps=len(indices) / total * rate,
        frame_indices=indices,
        total_frames=total,
        duration=total / rate,
        source=source,
        backend=f"qwen-vl-utils ({metadata.get('video_backend')})",
    )


def _open(path: Path):
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise VideoError(f"{path}: not an image that can be read ({error})") from error
    if upright.mode.startswith("I;16"):
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    return upright.convert("RGB")


def _natural(path: Path) -> list[tuple[int, int | str]]:
    """Sort key under which frame_2 comes before frame_10."""
    parts = re.split(r"(\d+)", path.name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
