"""Many questions about one film in one row: the film is encoded once, and no question sees another.

Row: ``<|im_start|> user <|vision_start|>``, the film's tokens, then a block for every question: ``<|vision_end|>``, its
words, ``<|im_end|> <|im_start|> assistant``, its answer. Every block has the positions that it would have alone.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from .questions import Question
from .world import CELLS, FRAMES_PER_STEP, MERGE, PATCH

PREFIX = 3
BLOCK = 12
"""Tokens of a question's block; shorter ones are padded behind their answer."""


@dataclass
class Batch:
    ids: torch.Tensor
    """[B, L] int64."""
    positions: torch.Tensor
    """[3, B, L] int64."""
    mask: torch.Tensor
    """[B, 1, L, L] bool: True where a query sees a key."""
    ask: torch.Tensor
    """[B, Q] int64: the column whose logits are the answer. The next one's are the end of the turn."""
    answers: torch.Tensor
    """[B, Q] int64."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


def patchify(frames: np.ndarray) -> torch.Tensor:
    """[F, SIDE, SIDE, 3] uint8 -> [F / 2, patches, 3 * 2 * PATCH^2] uint8, in the order of the video processor."""
    side = frames.shape[1] // (MERGE * PATCH)
    split = torch.from_numpy(frames).view(-1, FRAMES_PER_STEP, side, MERGE, PATCH, side, MERGE, PATCH, 3)
    return split.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(len(split), side * side * MERGE**2, -1)


class Packer:
    """Packs films and their questions for ``processor``'s tokenizer."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = processor.tokenizer
        self._ids: dict[str, list[int]] = {}
        self.prefix = self.encode("<|im_start|>user<|vision_start|>")
        self.video = self.tokenizer.convert_tokens_to_ids("<|video_pad|>")

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, kept for the next time."""
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._ids[text]

    def pack_text(
        self, ends: list[int], tokens: int, questions: list[list[Question]], text_behind_time: np.ndarray
    ) -> Batch:
        """A batch without the positions of its ``tokens`` tokens of video. ``ends``: of each
        film, the positions that its longest axis takes."""
        samples, count = len(questions), len(questions[0])
        length = PREFIX + tokens + count * BLOCK
        start = PREFIX + tokens
        ids = np.full((samples, length), self.tokenizer.pad_token_id)
        ids[:, :PREFIX], ids[:, PREFIX:start] = self.prefix, self.video
        positions = np.zeros((3, samples, length), np.int64)
        positions[:, :, :PREFIX] = np.arange(PREFIX)
        first = PREFIX + np.where(text_behind_time, np.array(ends)[:, None], CELLS)
        positions[:, :, start:] = (first[:, :, None] + np.arange(BLOCK)).reshape(samples, -1)
        ask = np.zeros((samples, count), np.int64)
        answers = np.zeros((samples, count), np.int64)
        for sample, asked in enumerate(questions):
            for number, question in enumerate(asked):
                block = self.encode(f"<|vision_end|>{question.text}<|im_end|><|im_start|>assistant")
                (answer,) = self.encode(question.answer)
                at = start + number * BLOCK
                ids[sample, at : at + len(block) + 1] = [*block, answer]
                ask[sample, number], answers[sample, number] = at + len(block) - 1, answer
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            mask(tokens, count)[None, None].expand(samples, 1, -1, -1),
            torch.from_numpy(ask),
            torch.from_numpy(answers),
        )


def mask(tokens: int, count: int) -> torch.Tensor:
    """[L, L] bool of a row with ``tokens`` of video and ``count`` blocks: causal, blind to other blocks."""
    shared = torch.full((PREFIX + tokens,), -1)
    block = torch.cat([shared, torch.arange(count).repeat_interleave(BLOCK)])
    return ((block[None] == -1) | (block[:, None] == block[None])).tril()
