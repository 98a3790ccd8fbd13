"""What happens in a film: coloured shapes that appear one after another, move, and go."""

from dataclasses import dataclass

import numpy as np

SIDE, PATCH, MERGE = 112, 14, 2
"""Pixels of a frame's side and of a patch's, and patches of a token's side."""
CELL = PATCH * MERGE
CELLS = SIDE // CELL
"""Tokens in a row and in a column of one time step."""
FRAMES_PER_STEP, FPS = 2, 2.0
"""A step of the token grid is two frames, so one second."""
SLOT = 4
"""Seconds: at most one shape appears in each slot, at its start."""
LONGEST = 120

COLOURS = {
    "red": (222, 40, 40),
    "green": (40, 185, 60),
    "blue": (45, 75, 235),
    "yellow": (238, 218, 45),
    "purple": (175, 50, 205),
    "cyan": (55, 215, 225),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COUNTS = ("one", "two", "three", "four")
MOST_SHAPES = 6

SPLITS = {"train": 0, "validation": 1, "test": 2}
"""First word of every random state, so that no two splits share a film."""


@dataclass(frozen=True)
class Shape:
    """One coloured shape on its way."""

    colour: str
    shape: str
    direction: str
    start: int
    """Second at which it appears: a multiple of ``SLOT``."""
    seconds: int
    """How long it stays."""
    position: tuple[int, int]
    """(x, y) of its centre when it appears, in pixels."""
    speed: int
    """Pixels that it moves in half a second."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def centre(self, second: float) -> tuple[int, int] | None:
        """(x, y) at a moment of the film, or None while it is not there."""
        if not self.start <= second < self.start + self.seconds:
            return None
        # It stops at its last half second, so that it stays inside the frame at any frame rate.
        moved = round(self.speed * min((second - self.start) * FPS, self.seconds * FPS - 1))
        dx, dy = DIRECTIONS[self.direction]
        return self.position[0] + dx * moved, self.position[1] + dy * moved


@dataclass(frozen=True)
class Scene:
    """A film, before it is drawn."""

    split: str
    number: int
    seconds: int
    shapes: tuple[Shape, ...]
    """In the order in which they appear."""

    def random(self, purpose: int) -> np.random.Generator:
        """The film's own random state for what is drawn and asked: another for every ``purpose``."""
        return np.random.default_rng((SPLITS[self.split], self.number, self.seconds, purpose))


def sample_scene(split: str, number: int, seconds: int, shapes: int | None = None) -> Scene:
    """Film ``number`` of a split. The same three always give the same film.

    Args:
        split: of ``SPLITS``.
        number: 0 or more.
        seconds: length of the film, from ``SLOT`` to ``LONGEST``.
        shapes: how many appear. None: two to ``MOST_SHAPES``, as the slots allow.

    Raises ValueError where one of them is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if number < 0 or not SLOT <= seconds <= LONGEST:
        raise ValueError(f"expected number >= 0 and {SLOT} <= seconds <= {LONGEST}, got {number} and {seconds}")
    slots = seconds // SLOT
    if shapes is not None and not 1 <= shapes <= min(slots, MOST_SHAPES):
        raise ValueError(f"expected 1 to {min(slots, MOST_SHAPES)} shapes in {seconds} s, got {shapes}")
    random = np.random.default_rng((SPLITS[split], number, seconds))
    most = min(slots, MOST_SHAPES)
    count = shapes or int(random.integers(min(2, most), most + 1))
    starts = np.sort(random.permutation(slots)[:count]) * SLOT
    colours = palette = random.permutation(len(COLOURS))
    if random.random() < 0.5:  # few colours, so that there is something to count
        few = palette[: int(random.integers(2 if count > len(COUNTS) else 1, 4))]
        colours = random.choice(few, count)
        while np.bincount(colours).max() > len(COUNTS):
            colours = random.choice(few, count)
    names = list(COLOURS)
    return Scene(
        split,
        number,
        seconds,
        tuple(
            _sample_shape(random, names[colour], int(start))
            for colour, start in zip(colours[:count], starts, strict=True)
        ),
    )


def _sample_shape(random: np.random.Generator, colour: str, start: int) -> Shape:
    shape, way, seconds, speed, row = random.integers((0, 0, 2, 8, 0), (len(SHAPES), len(DIRECTIONS), 4, 13, CELLS))
    direction = list(DIRECTIONS)[way]
    half = CELL // 2
    # Along its way it stays inside the frame; across it keeps to one row or column of tokens.
    length = int(speed) * (FRAMES_PER_STEP * int(seconds) - 1)
    along = int(random.integers(half, SIDE - half - length + 1))
    if sum(DIRECTIONS[direction]) < 0:
        along = SIDE - along
    across = CELL * int(row) + half + int(random.integers(-2, 3))
    position = (along, across) if direction in ("left", "right") else (across, along)
    return Shape(colour, SHAPES[shape], direction, start, int(seconds), position, int(speed))
