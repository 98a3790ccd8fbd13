"""Answers to look at while a training runs."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qts_video.train.model import SelectingModel

FILE = "predictions.jsonl"


class Predictions(TrainerCallback):
    """At every evaluation, greedy answers to its first samples: printed, and added to ``predictions.jsonl`` in the
    output folder, an object a line with step, sample, prediction and answer.

    Every process makes them, since their parameters may be sharded; the first one writes.

    Args:
        model: in training.
        collator: a list of samples -> inputs with ``labels``, right-padded.
        dataset: by number.
        processing_class: decodes them; without it they stay token ids.
    """

    def __init__(
        self,
        model: SelectingModel,
        collator: Callable[[Sequence[Any]], dict[str, Any]],
        dataset: Any,
        processing_class: Any | None = None,
    ) -> None:
        self.model, self.collator, self.dataset = model, collator, dataset
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        training = self.model.training
        self.model.eval()
        lines = [self._answer(number, args) for number in range(min(args.predictions, len(self.dataset)))]
        self.model.train(training)
        if not state.is_world_process_zero:
            return
        with (Path(args.output_dir) / FILE).open("a") as file:
            for number, (prediction, answer) in enumerate(lines):
                line = {"step": state.global_step, "sample": number, "prediction": prediction, "answer": answer}
                file.write(json.dumps(line) + "\n")
                print(f"step {state.global_step}, sample {number}: {prediction!r}, expected {answer!r}")

    @torch.no_grad()
    def _answer(self, number: int, args: Any) -> tuple[Any, Any]:
        """What the model generates for a sample, and its answer: text, or token ids [n]."""
        batch = dict(self.collator([self.dataset[number]]))
        labels = batch.pop("labels")
        seconds = batch.pop("seconds_per_step", None)
        if seconds is not None:
            self.model.handle.seconds_per_step(seconds)
        learnt = labels[0] != -100
        start = int(learnt.nonzero()[0])
        prompt = {name: (x[:, :start] if x.shape == labels.shape else x).to(args.device) for name, x in batch.items()}
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            ids = self.model.model.generate(**prompt, do_sample=False, max_new_tokens=args.prediction_tokens)
        return self._text(ids[0, start:]), self._text(labels[0][learnt])

    def _text(self, ids: torch.Tensor) -> str | list[int]:
        if self.tokenizer is None:
            return ids.tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
