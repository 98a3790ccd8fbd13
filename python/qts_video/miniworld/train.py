"""Everything from scratch, from one seed: the vision tower, the language model, the selectors."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoProcessor

from qts_video.methods import QTSplus

from . import sight
from .evaluate import reference_layer
from .forward import answer_states
from .lite import Films, train_lite
from .memory import pack_rows
from .model import build_model, build_processor, load_model
from .packing import Packer
from .questions import Question, sample_questions
from .selectors import selection_loss
from .workers import average_gradients, launch
from .world import LONGEST, MOST_SHAPES, SLOT, Scene, sample_scene

WEIGHTS = {"colour": 1.0, "shape": 1.0, "order": 2.0, "direction": 1.3, "second": 2.5, "count": 1.5}
"""How often each kind is asked: the hard ones more."""
SELECTORS: dict[str, tuple[float, dict[str, Any]]] = {
    "qtsplus": (1.0, {}),
    "qtsplus-no-reencoder": (0.25, {"reencode_layers": 0}),
    "qtsplus-no-time": (1.0, {"time_embedding": False}),
    "qtsplus-compact": (0.5, {}),
    "qtsplus-compact-no-time": (0.5, {"time_embedding": False}),
}
"""Of each selector, its share of the steps and what is not ``QTSplus``'s default. What scores is found soon; what
re-encodes takes longer, to leave alone what was right. Those named compact are trained at compact positions, as the
released selectors were: there only the re-encoder knows when a token was."""
_RATIOS = (0.05, 0.1, 0.25)
_SELECTOR_SECONDS = (12, 16, 24, 30, 40, 60)


@dataclass(frozen=True)
class Recipe:
    """Steps, batches and learning rates. A batch is that of all processes together.

    Raises ValueError where several processes are to share a GPU.
    """

    seed: int = 0
    processes: int = 2
    """On a GPU: 1."""
    device: str = "cpu"
    sight_steps: int = 800
    sight_batch: int = 64
    sight_rate: float = 2e-3
    language_steps: int = 1600
    language_batch: int = 64
    language_questions: int = 8
    language_rate: float = 2e-3
    selector_steps: int = 1200
    selector_batch: int = 32
    selector_rate: float = 1e-3
    lite_steps: int = 300
    lite_batch: int = 16
    lite_rate: float = 1e-3
    variants: int = 6
    empty: int = 1000

    def __post_init__(self) -> None:
        if self.device != "cpu" and self.processes != 1:
            raise ValueError(f"expected 1 process on {self.device}, got {self.processes}")


def train(folder: Path, recipe: Recipe, log: Callable[[str], None] = print) -> None:
    """Write ``folder/model``, a folder for each of ``SELECTORS`` and ``folder/lite``.

    What a stage has written is not trained again: an interrupted training goes on with the stage that it was in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, stage in (("sight", _train_sight), ("model", _train_language)):
        if not (folder / name).is_dir():
            launch(stage, recipe.processes, folder, recipe, log)
    for name in SELECTORS:
        if not (folder / name).is_dir():
            launch(_train_selector, recipe.processes, folder, recipe, log, name)
    if not (folder / "lite").is_dir():
        _train_lite(folder, recipe, log)


class Lesson:
    """The optimiser's side of a training: a step, its schedule, and a line of the log now and then."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rate: float,
        steps: int,
        rank: int,
        processes: int,
        log: Callable[[str], None],
        matrices: Iterable[nn.Parameter] = (),
    ) -> None:
        self.parameters, self.steps, self.processes = list(parameters), steps, processes
        matrices = list(matrices)
        others = [p for p in self.parameters if all(p is not matrix for matrix in matrices)]
        self.optimizers = [torch.optim.AdamW(others, rate, betas=(0.9, 0.98), weight_decay=0.02)]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, 10 * rate, weight_decay=0.02))
        self.schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                one, one.param_groups[0]["lr"], total_steps=steps, pct_start=0.04, cycle_momentum=False
            )
            for one in self.optimizers
        ]
        self.log = log if rank == 0 else None
        self.right: dict[str, list[float]] = {}
        self.began = time.monotonic()

    def step(self, number: int, loss: torch.Tensor, kinds: Iterable[str], right: Iterable[float]) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        average_gradients(self.parameters, self.processes)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in (*self.optimizers, *self.schedules):
            part.step()
        for kind, value in zip(kinds, right, strict=True):
            sums = self.right.setdefault(kind, [0.0, 0.0])
            sums[:] = 0.99 * sums[0] + value, 0.99 * sums[1] + 1
        if self.log is not None and (number % 20 == 0 or number == self.steps - 1):
            shares = ", ".join(f"{kind} {sums[0] / sums[1]:.3f}" for kind, sums in sorted(self.right.items()))
            self.log(
                f"{number} of {self.steps}, {time.monotonic() - self.began:.0f} s: loss {loss.item():.3f}; {shares}"
            )


def _train_sight(rank: int, processes: int, folder: Path, recipe: Recipe, log: Callable[[str], None]) -> None:
    processor = build_processor()
    model = build_model(processor, recipe.seed)
    torch.manual_seed(recipe.seed)
    heads = sight.Heads.of(model, processor.tokenizer).to(recipe.device)
    visual = model.to(recipe.device).model.visual
    batch = recipe.sight_batch // processes
    lesson = Lesson(
        [*visual.parameters(), *heads.parameters()], recipe.sight_rate, recipe.sight_steps, rank, processes, log
    )
    for step in range(recipe.sight_steps):
        loss, right = sight.lesson(visual, heads, processor, (step * processes + rank) * batch, batch)
        lesson.step(step, loss, ("there", "colour", "shape", "direction"), right.tolist())
    if rank == 0:
        sight.rescale(visual, processor)
        model.save_pretrained(folder / "sight")


def language_plan(progress: float, random: np.random.Generator) -> tuple[int, tuple[int, int], int]:
    """(tokens of a row, shortest and longest film in seconds, fewest shapes) at a point of the training, from 0 to 1:
    short films first, and several shapes from the start, since what is alone is found without looking for it."""
    if progress < 0.2:
        return 64, (12, 24), 3
    longest = int(24 * (LONGEST / 24) ** min((progress - 0.2) / 0.3, 1.0))
    size = random.random()
    if size < 0.7:
        return 64, (8, longest), 2
    return (128, (8, longest), 2) if size < 0.9 else (192, (12, longest), 2)


def sample_films(
    first: int, count: int, seconds: tuple[int, int], fewest: int, random: np.random.Generator
) -> list[Scene]:
    """Training films ``first``, ...: lengths even on a logarithmic scale, ``fewest`` shapes or more."""
    shortest, longest = seconds
    found = []
    for number in range(first, first + count):
        length = int(shortest * (longest / shortest + 1 / shortest) ** random.random())
        most = min(length // SLOT, MOST_SHAPES)
        found.append(sample_scene("train", number, length, int(random.integers(min(fewest, most), most + 1))))
    return found


def _train_language(rank: int, processes: int, folder: Path, recipe: Recipe, log: Callable[[str], None]) -> None:
    processor = build_processor()
    model = load_model(folder / "sight").to(recipe.device)
    bank = sight.Bank.fill(model.model.visual, processor, recipe.variants, recipe.empty)
    packer = Packer(processor)
    end = processor.tokenizer.eos_token_id
    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim == 2]
    lesson = Lesson(parameters, recipe.language_rate, recipe.language_steps, rank, processes, log, matrices)
    batch = recipe.language_batch // processes
    for step in range(recipe.language_steps):
        random = np.random.default_rng((recipe.seed, step))  # the same on every process: rows of one length
        tokens, seconds, fewest = language_plan(step / recipe.language_steps, random)
        scenes = sample_films((step * processes + rank) * batch, batch, seconds, fewest, random)
        questions = [sample_questions(scene, recipe.language_questions, WEIGHTS) for scene in scenes]
        behind = random.random((batch, recipe.language_questions)) < 0.3
        packed, vision = pack_rows(packer, bank, scenes, questions, tokens, 0.3, behind)
        packed, vision = packed.to(model.device), vision.to(model.device)
        states = answer_states(model, packed, vision.float())
        logits = functional.linear(states.float(), model.lm_head.weight)
        loss = functional.cross_entropy(logits[:, :, 0].flatten(0, 1), packed.answers.flatten())
        stops = functional.cross_entropy(
            logits[:, :, 1].flatten(0, 1), packed.answers.flatten().new_full((batch * recipe.language_questions,), end)
        )
        right = (logits[:, :, 0].argmax(-1) == packed.answers).flatten().tolist()
        lesson.step(step, loss + 0.1 * stops, _kinds(questions), right)
    if rank == 0:
        model.save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")


def _train_selector(
    rank: int, processes: int, folder: Path, recipe: Recipe, log: Callable[[str], None], name: str
) -> None:
    processor = build_processor()
    model = load_model(folder / "model").to(recipe.device).requires_grad_(False)
    bank = sight.Bank.fill(model.model.visual, processor, recipe.variants, recipe.empty)
    packer = Packer(processor)
    share, options = SELECTORS[name]
    steps, compact = round(share * recipe.selector_steps), name.startswith("qtsplus-compact")
    selector = QTSplus.from_language_model(model, tau_s=0.02, n_max=512, seed=recipe.seed, **options).selector
    selector.train()
    parameters = [parameter for _, parameter in selector.trained_parameters()]
    lesson = Lesson(parameters, recipe.selector_rate, steps, rank, processes, log)
    batch = recipe.selector_batch // processes
    for step in range(steps):
        random = np.random.default_rng((recipe.seed, step))
        easy = step < 0.3 * steps
        seconds = int(random.integers(8, 25)) if easy else int(random.choice(_SELECTOR_SECONDS))
        ratio = max(_RATIOS) if easy else float(random.choice(_RATIOS))
        first = 5_000_000 + (step * processes + rank) * batch
        scenes = [sample_scene("train", first + number, seconds) for number in range(batch)]
        questions = [sample_questions(scene, 1, WEIGHTS) for scene in scenes]
        asked = [one for (one,) in questions]
        loss, right = selection_loss(model, selector, packer, bank, scenes, asked, ratio, compact=compact)
        lesson.step(step, loss, _kinds(questions), right.tolist())
    if rank == 0:
        selector.eval()
        selector.save_pretrained(folder / name)


def _train_lite(folder: Path, recipe: Recipe, log: Callable[[str], None]) -> None:
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = load_model(folder / "model")
    layer, _ = reference_layer(model, processor)
    log(f"lite: learns from layer {layer}")
    lessons = Films(8_000_000, recipe.lite_steps * recipe.lite_batch, (8, 24), WEIGHTS)
    options = {
        "learning_rate": recipe.lite_rate,
        "max_steps": recipe.lite_steps,
        "per_device_train_batch_size": recipe.lite_batch,
        "warmup_steps": recipe.lite_steps // 20,
        "seed": recipe.seed,
        "dataloader_num_workers": recipe.processes - 1,
        "use_cpu": recipe.device == "cpu",
    }
    train_lite(model, processor, folder / "lite", layer, lessons, options, log)


def _kinds(questions: list[list[Question]]) -> list[str]:
    return [question.kind for asked in questions for question in asked]
