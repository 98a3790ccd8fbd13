"""Draw a film: a noisy scene with flickering specks, and the shapes of a ``Scene`` on their way."""

from functools import cache

import numpy as np

from .world import CELL, CELLS, COLOURS, FPS, FRAMES_PER_STEP, SHAPES, SIDE, Scene, Shape

STAMP = 24
"""Pixels of the square that a shape is drawn in."""
NOISE = 36
"""Noise of every pixel of every frame: 0 to NOISE - 1 on top of the background."""
_BANK = 48
_SPECKS = 3
_PALETTE = np.array(list(COLOURS.values()), np.uint8)
_NAMES = list(COLOURS)
_GREYS = np.array([[20] * 3, [235] * 3], np.uint8)


@cache
def masks() -> np.ndarray:
    """[shapes, STAMP, STAMP] bool: the pixels of each shape of ``SHAPES``."""
    y, x = np.mgrid[0:STAMP, 0:STAMP] - (STAMP - 1) / 2
    distance = np.hypot(x, y)
    drawn = {
        "circle": distance < 11.5,
        "square": (abs(x) < 10) & (abs(y) < 10),
        "triangle": (y < 9.6) & (abs(x) < (y + 11.5) * 0.55),
        "cross": ((abs(x) < 4) | (abs(y) < 4)) & (abs(x) < 11) & (abs(y) < 11),
        "ring": (distance < 11.7) & (distance > 6),
    }
    return np.stack([drawn[shape] for shape in SHAPES])


@cache
def _noise() -> np.ndarray:
    """[bank, SIDE, SIDE, 3] uint8."""
    return np.random.default_rng(20260).integers(0, NOISE, (_BANK, SIDE, SIDE, 3), np.uint8)


def render(scene: Scene, seconds: np.ndarray | None = None) -> np.ndarray:
    """[F, SIDE, SIDE, 3] uint8: the film at these moments, ascending; None: at ``FPS`` from its start to its end.

    Noise and specks are drawn anew at each moment, from the film's random state.
    """
    if seconds is None:
        seconds = np.arange(round(scene.seconds * FPS)) / FPS
    random = scene.random(purpose=0)
    count = len(seconds)
    frames = background(random) + _noise()[random.integers(0, _BANK, count)]
    if random.random() < 0.5:
        frames = np.ascontiguousarray(frames[:, :, ::-1])
    _draw_specks(frames, random)
    stamps = [
        (frame, *centre, SHAPES.index(shape.shape), _NAMES.index(shape.colour))
        for shape in scene.shapes
        for frame in range(*np.searchsorted(seconds, (shape.start, shape.start + shape.seconds)))
        if (centre := shape.centre(seconds[frame])) is not None
    ]
    if stamps:
        frame, x, y, shape, colour = np.array(stamps).T
        mask = masks()[shape]
        stamp, row, column = mask.nonzero()
        frames[frame[stamp], y[stamp] - STAMP // 2 + row, x[stamp] - STAMP // 2 + column] = _PALETTE[colour[stamp]]
    return frames


def background(random: np.random.Generator) -> np.ndarray:
    """[SIDE, SIDE, 3] uint8: smooth hills in a muted colour."""
    coarse = random.random((5, 5))
    at = np.linspace(0, 4, SIDE, endpoint=False)
    low = at.astype(int)
    part = at - low
    rows = coarse[low] * (1 - part)[:, None] + coarse[low + 1] * part[:, None]
    hills = rows[:, low] * (1 - part) + rows[:, low + 1] * part
    tint = 60 + 60 * random.random() + 20 * random.random(3)
    return (tint + 50 * (hills[..., None] - 0.5)).astype(np.uint8)


def _draw_specks(frames: np.ndarray, random: np.random.Generator) -> None:
    """Distractors: black and white squares of 4 pixels, a few in every frame, somewhere else in the next."""
    count = len(frames)
    y, x = random.integers(0, SIDE - 4, (2, count, _SPECKS))
    colour = _GREYS[random.integers(0, len(_GREYS), (count, _SPECKS))]
    off = np.arange(4)
    frame = np.arange(count)[:, None, None, None]
    frames[frame, (y[..., None] + off)[..., None], (x[..., None] + off)[..., None, :]] = colour[:, :, None, None]


def cells(shape: Shape) -> np.ndarray:
    """[n, 3] int64 of (step, row, column): the token cells that hold at least an eighth of the shape's pixels in one of
    the step's two frames."""
    mask = masks()[SHAPES.index(shape.shape)]
    row, column = mask.nonzero()
    found = []
    for frame in range(round(shape.start * FPS), round((shape.start + shape.seconds) * FPS)):
        if (centre := shape.centre(frame / FPS)) is None:
            continue
        x, y = centre
        cell = (y - STAMP // 2 + row) // CELL * CELLS + (x - STAMP // 2 + column) // CELL
        held = np.bincount(cell, minlength=CELLS**2).nonzero()[0]
        held = held[np.bincount(cell, minlength=CELLS**2)[held] * 8 >= len(row)]
        found += [(frame // FRAMES_PER_STEP, one // CELLS, one % CELLS) for one in held.tolist()]
    return np.array(sorted(set(found)), np.int64).reshape(-1, 3)
