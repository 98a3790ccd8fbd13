"""Ask the model about films it never saw, with and without selection, by the way that users go: the processor,
``attach``, the model's forward."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qts_video.answer import Prompt, prepare
from qts_video.attach import attach
from qts_video.cache import VideoCache
from qts_video.methods import Uniform
from qts_video.plot.probe import Probe, number_of_layers
from qts_video.plot.recall import best_layer, recall_at_k
from qts_video.video import Video

from .questions import KINDS, Question, all_questions
from .render import cells, render
from .world import CELLS, FPS, Scene, sample_scene

ALL_TOKENS = Uniform(retention_ratio=1.0)
"""Keeps everything, which is the model alone bit for bit, and encodes a film once for all its questions."""
VALIDATED = 30
"""Films by which the reference layer is chosen."""
FRAMES_PER_SET = 128
"""Steps that FlexSelect scores at once: all of the longest film's."""


@dataclass(frozen=True)
class Outcome:
    kind: str
    method: str
    right: bool
    found: float
    """Share of the needle's tokens that were kept."""


def as_video(scene: Scene) -> Video:
    """The film as ``read_video`` would give it at ``FPS``, without a file."""
    frames = torch.from_numpy(render(scene)).permute(0, 3, 1, 2)
    count = len(frames)
    seconds = [number / FPS for number in range(count)]
    return Video(frames, seconds, FPS, list(range(count)), count, count / FPS, "miniworld", "render")


def needle(question: Question) -> torch.Tensor:
    """[K] int64, ascending: the film's tokens that hold what the question is about."""
    place = np.concatenate([cells(shape) for shape in question.about])
    return torch.from_numpy(np.unique((place[:, 0] * CELLS + place[:, 1]) * CELLS + place[:, 2]))


def one_of_each(scene: Scene) -> list[Question]:
    """One question of every kind that the film allows, drawn by its random state."""
    random = scene.random(purpose=3)
    asked = [all_questions(scene)[kind] for kind in KINDS]
    return [questions[int(random.integers(len(questions)))] for questions in asked if questions]


def films(split: str, first: int, count: int, seconds: tuple[int, int]) -> list[Scene]:
    """``count`` films of a length between the two of ``seconds``, by turns."""
    shortest, longest = seconds
    return [
        sample_scene(split, first + number, shortest + number % (longest - shortest + 1)) for number in range(count)
    ]


@torch.inference_mode()
def ask(
    model: Any, processor: Any, scenes: list[Scene], selectors: Mapping[str, Any], *, positions: str = "original"
) -> Iterator[Outcome]:
    """Every film, one question of each kind, every selector. The answer is the likeliest word."""
    for scene in scenes:
        questions = one_of_each(scene)
        video = as_video(scene)
        first = prepare(processor, video, questions[0].text)
        prompts = [first, *(_reworded(processor, first, question.text) for question in questions[1:])]
        cache = VideoCache()
        for name, selector in selectors.items():
            with attach(model, selector, tokenizer=processor.tokenizer, positions=positions, cache=cache) as handle:
                for question, prompt in zip(questions, prompts, strict=True):
                    said = int(model(**prompt, logits_to_keep=1).logits[0, -1].argmax())
                    found = torch.isin(needle(question), handle.last.videos[0].indices).float().mean().item()
                    right = processor.tokenizer.decode([said]).strip() == question.answer
                    yield Outcome(question.kind, name, right, found)


@torch.inference_mode()
def recall_by_layer(model: Any, processor: Any, scenes: list[Scene]) -> dict[int, list[float]]:
    """Of each layer, Recall@K of every question, K being the tokens of its needle."""
    found: dict[int, list[float]] = {layer: [] for layer in range(number_of_layers(model))}
    probe = Probe(list(found), reduce="max", query="prompt", frames_per_set=FRAMES_PER_SET)
    with attach(model, probe, tokenizer=processor.tokenizer):
        for scene in scenes:
            questions = one_of_each(scene)
            first = prepare(processor, as_video(scene), questions[0].text)
            for question in questions:
                model(**_reworded(processor, first, question.text), logits_to_keep=1)
                for layer, scores in probe.relevance.items():
                    found[layer].append(recall_at_k(scores, needle(question)))
    return found


def reference_layer(model: Any, processor: Any) -> tuple[int, dict[int, list[float]]]:
    """The layer whose Recall@K over validation films of half a minute is best, and that of all layers."""
    recalls = recall_by_layer(model, processor, films("validation", 0, VALIDATED, (30, 30)))
    return best_layer(recalls), recalls


def _reworded(processor: Any, prompt: Prompt, text: str) -> Prompt:
    """``prompt`` with another question: its pixels are not computed anew."""
    end = int((prompt["input_ids"][0] == processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")).nonzero()) + 1
    words = processor.tokenizer(f"{text}<|im_end|><|im_start|>assistant", return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt["input_ids"][:, :end], words], 1)
    inputs = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in prompt:
        inputs["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"][:, :end], torch.zeros_like(words)], 1)
    return Prompt(inputs)


def accuracy(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """Of each method, the share of right answers by kind, their mean over the kinds ("all"), the share of needle tokens
    kept ("found") and how many questions there were ("questions")."""
    table: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(outcome.method for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.method == method]
        by_kind = {
            kind: float(np.mean([o.right for o in own if o.kind == kind]))
            for kind in KINDS
            if any(o.kind == kind for o in own)
        }
        found = float(np.mean([o.found for o in own]))
        table[method] = by_kind | {"all": float(np.mean(list(by_kind.values()))), "found": found, "questions": len(own)}
    return table
