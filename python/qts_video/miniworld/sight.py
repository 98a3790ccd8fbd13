"""The vision tower's own lesson: what does every token show? Then a bank of what it saw, to train the language model
on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .forward import encode_steps, normalise
from .packing import patchify
from .render import cells, render
from .world import CELLS, COLOURS, DIRECTIONS, FPS, FRAMES_PER_STEP, SHAPES, SLOT, Shape, sample_scene

SIZES = (len(COLOURS), len(SHAPES), len(DIRECTIONS))
NAMES = tuple(list(names) for names in (COLOURS, SHAPES, DIRECTIONS))


class Heads(nn.Module):
    """Reads from a token whether a shape is there, and its colour, form and direction by the language model's own words
    for them, so that both speak of one thing in one way. What it has itself is thrown away afterwards."""

    def __init__(self, words: torch.Tensor) -> None:
        super().__init__()
        self.there = nn.Linear(words.shape[1], 1)
        self.bias = nn.Parameter(torch.zeros(len(words)))
        self.register_buffer("words", words.detach().clone())

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> "Heads":
        names = [name for names in NAMES for name in names]
        return cls(model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(names)])

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        normed = functional.layer_norm(tokens, tokens.shape[-1:])
        return self.there(normed), *functional.linear(normed, self.words, self.bias).split(SIZES, -1)


def sample_steps(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``count`` single steps from films ``first``, ...: uint8 patches [count, patches, values], whether each token
    holds a shape [count, tokens] bool, and its (colour, form, direction) [count, 3] int64."""
    patches, held = [], torch.zeros(count, CELLS**2, dtype=torch.bool)
    named = torch.zeros(count, 3, dtype=torch.int64)
    for row in range(count):
        scene = sample_scene("train", first + row, SLOT, shapes=1)
        (shape,) = scene.shapes
        step = (first + row) % SLOT
        patches.append(patchify(render(scene, _moments(step, 1))))
        for _, y, x in (found := cells(shape))[found[:, 0] == step]:
            held[row, y * CELLS + x] = True
        named[row] = torch.tensor(labels(shape))
    return torch.cat(patches), held, named


def lesson(visual: Any, heads: Heads, processor: Any, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one batch, and the share of right answers for (presence, colour, form, direction)."""
    device = visual.patch_embed.proj.weight.device
    patches, held, wanted = (part.to(device) for part in sample_steps(first, count))
    inputs = normalise(patches, processor)
    with torch.autocast(device.type, torch.bfloat16):
        tokens = encode_steps(visual, inputs)
    there, *named = heads(tokens.float())
    loss = functional.binary_cross_entropy_with_logits(there.squeeze(-1), held.float())
    right = [((there.squeeze(-1) > 0) == held).float().mean()]
    row = held.nonzero()[:, 0]
    for logits, label in zip(named, wanted.T, strict=True):
        loss = loss + functional.cross_entropy(logits[held], label[row])
        right.append((logits[held].argmax(-1) == label[row]).float().mean())
    return loss, torch.stack(right)


@torch.no_grad()
def rescale(visual: Any, processor: Any, size: float = 0.35) -> None:
    """Give the tower's tokens the root mean square ``size``, that of the words, by its last layer."""
    last = visual.merger.mlp[2]
    patches, held, _ = (part.to(last.weight.device) for part in sample_steps(10**6, 64))
    factor = size / encode_steps(visual, normalise(patches, processor))[held].square().mean().sqrt()
    last.weight.mul_(factor)
    last.bias.mul_(factor)


@dataclass
class Bank:
    """What the tower made of many shapes' appearances and of empty scenes."""

    events: torch.Tensor
    """[colours, forms, directions, variants, seconds, tokens, D] float16."""
    held: torch.Tensor
    """[..., tokens] bool: which tokens show the shape."""
    empty: torch.Tensor
    """[N, tokens, D] float16."""

    @classmethod
    @torch.no_grad()
    def fill(cls, visual: Any, processor: Any, variants: int, empty: int, rank: int = 0) -> "Bank":
        """Every kind of shape ``variants`` times, all three seconds long (the third is empty where it stayed two)."""
        device = visual.patch_embed.proj.weight.device
        wanted = np.zeros(SIZES, int)
        events, held = None, None
        number, rows, where = 2_000_000 + rank * 10**6, [], []
        blank = []
        while (wanted < variants).any():
            scene = sample_scene("train", number, SLOT, shapes=1)
            number += 1
            label = labels(scene.shapes[0])
            if wanted[label] == variants or scene.shapes[0].seconds < 3:
                continue
            where.append((*label, wanted[label]))
            wanted[label] += 1
            rows.append(scene)
        for at in range(0, len(rows), 32):
            part = rows[at : at + 32]
            patches = torch.cat([patchify(render(scene, _moments(0, 4))) for scene in part]).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                tokens = encode_steps(visual, normalise(patches, processor)).to("cpu", torch.float16)
            tokens = tokens.view(len(part), 4, *tokens.shape[1:])
            if events is None:
                events = torch.zeros(*SIZES, variants, 3, *tokens.shape[2:], dtype=torch.float16)
                held = torch.zeros(*SIZES, variants, 3, CELLS**2, dtype=torch.bool)
            for scene, place, seen in zip(part, where[at : at + 32], tokens, strict=True):
                events[place] = seen[:3]
                for step, y, x in cells(scene.shapes[0]):
                    held[(*place, step, y * CELLS + x)] = True
                blank.append(seen[3])
        return cls(events, held, torch.stack(blank[:empty]))


def _moments(step: int, count: int) -> np.ndarray:
    return np.arange(step * FRAMES_PER_STEP, (step + count) * FRAMES_PER_STEP) / FPS


def labels(shape: Shape) -> tuple[int, int, int]:
    """Which colour, form and direction, as numbers."""
    return tuple(
        names.index(getattr(shape, part)) for names, part in zip(NAMES, ("colour", "shape", "direction"), strict=True)
    )
