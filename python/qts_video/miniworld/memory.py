"""The language model's lesson: rows of tokens from the bank, without the frames.

A film is put together from what the vision tower saw of single shapes and of empty scenes. Only some of its tokens are
there, as after a selection: so rows are short, films may be long, and the model learns to answer from what was kept.
"""

from dataclasses import dataclass

import numpy as np
import torch

from .packing import PREFIX, Batch, Packer
from .questions import Question
from .sight import Bank, labels
from .world import CELLS, Scene

TOKENS_A_STEP = CELLS**2


@dataclass
class Row:
    """Of one film, which tokens are there, and from where in the bank."""

    place: np.ndarray
    """[N] int64: step * TOKENS_A_STEP + cell, ascending."""
    tokens: torch.Tensor
    """[N, D] float16."""


def remember(bank: Bank, scene: Scene, count: int, random: np.random.Generator, fewest: float) -> Row:
    """``count`` tokens of a film: of every shape's, a share between ``fewest`` and 1 (at least two), then others.

    The film has at least ``count`` tokens.
    """
    kept = []
    share = fewest + (1 - fewest) * random.random() if random.random() < 0.5 else 1.0
    room = int(0.8 * count) // len(scene.shapes)
    variants = bank.events.shape[3]
    seen = {}
    for shape in scene.shapes:
        place = (*labels(shape), int(random.integers(variants)))
        for second in range(shape.seconds):
            seen[shape.start + second] = (place, second)
        step, cell = bank.held[place][: shape.seconds].numpy().nonzero()
        n = min(max(round(share * len(step)), 2), room, len(step))
        chosen = random.permutation(len(step))[:n]
        kept.append((shape.start + step[chosen]) * TOKENS_A_STEP + cell[chosen])
    kept = np.concatenate(kept)
    total = scene.seconds * TOKENS_A_STEP
    if total == count:
        place = np.arange(total)
    else:
        rest = random.permutation(total)
        place = np.sort(np.concatenate([kept, rest[~np.isin(rest, kept)][: count - len(kept)]]))
    tokens = bank.empty[
        torch.from_numpy(random.integers(len(bank.empty), size=count)), torch.from_numpy(place) % TOKENS_A_STEP
    ]
    for number, one in enumerate(place // TOKENS_A_STEP):
        if (source := seen.get(int(one))) is not None:
            at, second = source
            tokens[number] = bank.events[at][second, int(place[number]) % TOKENS_A_STEP]
    return Row(place, tokens)


def pack_rows(
    packer: Packer,
    bank: Bank,
    scenes: list[Scene],
    questions: list[list[Question]],
    count: int,
    fewest: float,
    text_behind_time: np.ndarray,
) -> tuple[Batch, torch.Tensor]:
    """A batch, and the tokens [B, count, D] of its films."""
    rows = [remember(bank, scene, count, scene.random(purpose=2), fewest) for scene in scenes]
    batch = packer.pack_text([max(scene.seconds, CELLS) for scene in scenes], count, questions, text_behind_time)
    place = torch.from_numpy(np.stack([row.place for row in rows]))
    cell = place % TOKENS_A_STEP
    positions = torch.stack([place // TOKENS_A_STEP, cell // CELLS, cell % CELLS]) + PREFIX
    batch.positions[:, :, PREFIX : PREFIX + count] = positions
    return batch, torch.stack([row.tokens for row in rows])
