"""Train a FlexSelect-Lite selector for the model of the world, by the library's own trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from qts_video.data import Collator, Sample
from qts_video.lite import LiteSelector
from qts_video.train.lite import LiteTrainer, LiteTrainingArguments
from qts_video.train.teacher import Teacher

from .evaluate import as_video
from .model import MROPE_SECTION, ROPE_THETA
from .questions import sample_questions
from .world import sample_scene

LAYERS = 2


class Films(torch.utils.data.Dataset):
    """Training films ``first``, ... of ``seconds`` (shortest, longest), with a question each."""

    def __init__(self, first: int, count: int, seconds: tuple[int, int], weights: dict[str, float]) -> None:
        self.first, self.count, self.seconds, self.weights = first, count, seconds, weights

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        shortest, longest = self.seconds
        number = self.first + index
        length = shortest + int(np.random.default_rng((11, number)).integers(longest - shortest + 1))
        scene = sample_scene("train", number, length)
        (question,) = sample_questions(scene, 1, self.weights)
        return Sample(as_video(scene), question.text, question.answer)


class _Log(TrainerCallback):
    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.log(f"lite {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}")


def build_student(model: Any) -> LiteSelector:
    """The first layers of ``model`` itself: the published selectors started from a small language model, too. The
    projector is random."""
    text = model.config.text_config
    student = LiteSelector.build(
        model,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        layers=LAYERS,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        rope_theta=ROPE_THETA,
        mrope_section=MROPE_SECTION,
    ).float()
    source = model.model.language_model.state_dict()
    student.decoder.load_state_dict({name: source[name] for name in student.decoder.state_dict()})
    return student


def train_lite(
    model: Any,
    processor: Any,
    folder: Path,
    layer: int,
    films: Films,
    options: dict[str, Any],
    log: Callable[..., None],
) -> None:
    """Write ``folder``: a selector that learnt from ``layer`` of ``model``.

    Args:
        options: of ``LiteTrainingArguments``.
    """
    teacher = Teacher(model, layer, tokenizer=processor.tokenizer)
    student = build_student(model)
    arguments = LiteTrainingArguments(
        str(folder), logging_steps=20, save_strategy="no", disable_tqdm=True, lr_scheduler_type="cosine", **options
    )
    trainer = LiteTrainer(
        student, teacher, arguments, Collator(processor, train=False), train_dataset=films, callbacks=[_Log(log)]
    )
    trainer.train()
    student.eval().save_pretrained(folder)
