"""The film that ``qts demo`` watches: a red circle crosses a textured scene, a blue square comes and goes."""

from pathlib import Path

import av
import numpy as np

SECONDS, RATE = 12, 12
WIDTH, HEIGHT = 532, 308
SQUARE_SHOWS = (5.0, 8.0)
"""Seconds between which the square is on the screen."""


def make_film(path: str | Path, seed: int = 0) -> Path:
    """Write an mp4 of ``SECONDS`` seconds: H.264 where PyAV can encode it, else MPEG-4."""
    path = Path(path)
    background = _texture(np.random.default_rng(seed))
    with av.open(str(path), "w") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(SECONDS * RATE):
            frame = av.VideoFrame.from_ndarray(_scene(background, number / RATE), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _texture(noise: np.random.Generator) -> np.ndarray:
    """[H, W, 3] float32: hills of smooth noise in muted colours over a fading sky."""
    picture = np.zeros((HEIGHT, WIDTH), np.float32)
    for cells, weight in ((4, 1.0), (9, 0.5), (20, 0.3), (60, 0.15)):
        coarse = noise.random((cells + 2, cells + 2)).astype(np.float32)
        picture += weight * _stretch(coarse, cells)
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    low, high = np.array([46, 74, 60], np.float32), np.array([176, 170, 138], np.float32)
    sky = np.linspace(1.15, 0.8, HEIGHT, dtype=np.float32)[:, None, None]
    return (low + (high - low) * picture[..., None]) * sky


def _stretch(coarse: np.ndarray, cells: int) -> np.ndarray:
    """Bilinear interpolation of a coarse grid to the size of the picture."""
    y = np.linspace(0, cells, HEIGHT, dtype=np.float32)
    x = np.linspace(0, cells, WIDTH, dtype=np.float32)
    top, left = y.astype(int), x.astype(int)
    v, u = (y - top)[:, None], (x - left)[None, :]
    at = lambda dy, dx: coarse[np.ix_(top + dy, left + dx)]  # noqa: E731
    return (at(0, 0) * (1 - u) + at(0, 1) * u) * (1 - v) + (at(1, 0) * (1 - u) + at(1, 1) * u) * v


def _scene(background: np.ndarray, second: float) -> np.ndarray:
    """[H, W, 3] uint8 at a moment of the film."""
    picture = background.copy()
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    progress = second / SECONDS
    centre_x = 40 + (WIDTH - 80) * progress
    centre_y = HEIGHT / 2 - 70 * np.sin(2.5 * np.pi * progress)
    distance = np.hypot(x - centre_x, y - centre_y)
    inside = distance < 34
    picture[inside] = np.array([222, 44, 38]) * (1.1 - 0.35 * distance[inside, None] / 34)
    if SQUARE_SHOWS[0] <= second < SQUARE_SHOWS[1]:
        square = (abs(x - 0.8 * WIDTH) < 30) & (abs(y - 0.3 * HEIGHT) < 30)
        picture[square] = (38, 84, 214)
    return picture.clip(0, 255).astype(np.uint8)
