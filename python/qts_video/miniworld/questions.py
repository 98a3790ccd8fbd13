"""Questions about a film that have one exact answer, a single word."""

from collections import Counter
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from .world import COUNTS, Scene, Shape

KINDS = ("colour", "shape", "order", "direction", "second", "count")


@dataclass(frozen=True)
class Question:
    kind: str
    """Of ``KINDS``."""
    text: str
    answer: str
    about: tuple[Shape, ...]
    """The shapes that the answer rests on."""


def all_questions(scene: Scene) -> dict[str, list[Question]]:
    """Of each kind, every question with one exact answer. A kind may have none."""
    shapes = scene.shapes
    colours, forms = (Counter(getattr(s, part) for s in shapes) for part in ("colour", "shape"))
    once = [s for s in shapes if colours[s.colour] == 1]
    asked = {
        "colour": [
            Question("colour", f"which colour is the {s.shape}?", s.colour, (s,)) for s in shapes if forms[s.shape] == 1
        ],
        "shape": [Question("shape", f"which shape is {s.colour}?", s.shape, (s,)) for s in once],
        "order": [
            Question("order", f"which comes first {a.colour} or {b.colour}?", min(a, b, key=_start).colour, (a, b))
            for a, b in permutations(once, 2)
        ],
        "direction": [Question("direction", f"where does the {s.colour} shape move?", s.direction, (s,)) for s in once],
        "second": [Question("second", f"when does the {s.colour} shape appear?", str(s.start), (s,)) for s in once],
        "count": [],
    }
    for colour, count in colours.items():
        if count <= len(COUNTS):
            about = tuple(s for s in shapes if s.colour == colour)
            asked["count"].append(Question("count", f"how many {colour} shapes?", COUNTS[count - 1], about))
    return asked


def sample_questions(scene: Scene, count: int, weights: dict[str, float]) -> list[Question]:
    """``count`` questions: a kind by its weight, then one of its questions; how many, by the answer first, since most
    colours are there once. Some may be there twice, where the film has few."""
    random = scene.random(purpose=1)
    asked = {kind: questions for kind, questions in all_questions(scene).items() if questions and weights.get(kind)}
    share = np.array([weights[kind] for kind in asked])
    kinds = random.choice(len(asked), count, p=share / share.sum())
    pools = list(asked.values())
    return [_one(pools[kind], random) for kind in kinds]


def _one(pool: list[Question], random: np.random.Generator) -> Question:
    if pool[0].kind == "count":
        answers = sorted({question.answer for question in pool})
        answer = answers[int(random.integers(len(answers)))]
        pool = [question for question in pool if question.answer == answer]
    return pool[int(random.integers(len(pool)))]


def _start(shape: Shape) -> int:
    return shape.start
