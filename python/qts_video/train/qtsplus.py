"""Training of QTSplus on transformers' Trainer."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from qts_video.methods import QTSplus
from qts_video.train.arguments import QTSplusArguments
from qts_video.train.losses import budget_losses
from qts_video.train.model import MODEL, SelectingModel
from qts_video.train.numbered import NUMBER, Numbered, NumberedCollator, mix
from qts_video.train.predictions import Predictions


class QTSplusTrainer(Trainer):
    """Trains a QTSplus selector inside a video model, alone (stage 1) or with the language model (stage 2).

    The loss is the answers' cross entropy, plus the means over videos of ``qts_video.train.losses``. What the gate
    draws for a sample depends on ``args.seed``, the step and the sample's number alone, so neither on the number of
    processes nor on the batch; the running mean of rho moves once a step, by all processes' videos.

    A checkpoint is a folder that ``QTSplus.from_pretrained`` reads, with ``model/`` (``load_model`` reads it) or
    ``adapter/`` (peft's) in it after stage 2, and what a resumed training needs.

    Args:
        model: one that ``qts_video.attach`` takes. Frozen, except for what the stage trains, and with the selector
            attached from now on (``trainer.handle``).
        selector: ``QTSplus.from_language_model(model)``, or one to go on with.
        args: the recipe.
        data_collator: a list of samples -> the model's inputs with ``labels`` (right-padded, -100 outside of the
            answers), e.g. ``qts_video.data.Collator(processor, seconds_per_step=True)``.
        train_dataset: with a length, and samples by number, each with a video.
        eval_dataset: the same. Its loss is the cross entropy with the selection of inference.
        processing_class: the processor or tokenizer: by it questions are found in prompts (see ``attach``).
        callbacks, optimizers: see ``Trainer``.

    Raises:
        ValueError: a selector with a fixed budget; several GPUs in one process.
        TypeError: a model that ``attach`` does not know, or a data set without numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        selector: QTSplus,
        args: QTSplusArguments,
        data_collator: Callable[[Sequence[Any]], dict[str, Any]],
        train_dataset: Any | None = None,
        eval_dataset: Any | None = None,
        processing_class: Any | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"one process sees {args.n_gpu} GPUs: start one process a GPU, with torchrun or accelerate"
            )
        module = selector.selector
        if args.tau_s is not None:
            module.tau_s = module.config["tau_s"] = args.tau_s
        if args.n_max is not None:
            module.budget.n_max = module.config["n_max"] = args.n_max
        self.selecting = SelectingModel(
            model,
            selector,
            stage=args.stage,
            lora_rank=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            gate_noise=args.gate_noise,
            tokenizer=processing_class,
            positions=args.positions,
        )
        self._samples_in_step: Tensor | int = 1
        self._rho: list[Tensor] = []
        self._parts: dict[str, Tensor] = {}
        self._parts_since = 0
        super().__init__(
            model=self.selecting,
            args=args,
            data_collator=NumberedCollator(data_collator),
            train_dataset=None if train_dataset is None else Numbered(train_dataset),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.predictions and eval_dataset is not None:
            self.add_callback(Predictions(self.selecting, data_collator, eval_dataset, processing_class))

    @property
    def handle(self) -> Any:
        """What ``attach`` returned."""
        return self.selecting.handle

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of one step, and over how many tokens its cross entropy is averaged, over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
        samples = sum(len(batch["labels"]) for batch in batches)
        counts = torch.stack([tokens.to(device), torch.tensor(samples, device=device)])
        counts = self.accelerator.reduce(counts)
        self._samples_in_step = counts[1]
        return batches, counts[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """In training the part of the step's loss that this batch has, times the number of processes, whose gradients
        are averaged. In evaluation the cross entropy."""
        inputs = dict(inputs)
        numbers = inputs.pop(NUMBER, None)
        if not model.training:
            outputs = model(**inputs)
            return (outputs["loss"], outputs) if return_outputs else outputs["loss"]
        seeds = None
        if numbers is not None:
            seeds = [mix(self.args.seed, self.state.global_step, number) for number in numbers.tolist()]
        outputs = model(**inputs, seeds=seeds, num_items_in_batch=num_items_in_batch)
        args, module = self.args, self.selecting.selector.selector
        weights = (args.lambda_squared, args.lambda_linear, args.lambda_stability)
        losses = budget_losses(outputs["rho"], outputs["n_expected"], module.budget.n_max, module.rho_mean, weights)
        share = outputs["share"] / self._samples_in_step
        parts = {
            "cross_entropy": outputs["loss"],
            "budget_squared": (losses.squared * share).sum(),
            "budget_linear": (losses.linear * share).sum(),
            "budget_stability": (losses.stability * share).sum(),
        }
        loss = sum(parts.values())
        for name in ("rho", "kept", "tokens"):
            parts[name] = (outputs[name] * share).sum()
        if not self._parts:
            self._parts_since = self.state.global_step
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0) + part.detach() * self.accelerator.num_processes
        self._rho.append(outputs["rho"].detach())
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As ``Trainer``'s; behind the last batch of a step the running mean of rho moves."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            rho = torch.cat(self._rho)
            self._rho = []
            self.selecting.selector.selector.update_rho_mean(rho.sum(), len(rho), self.args.rho_momentum)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As ``Trainer``'s, with the means since the last line: of losses, rho, kept tokens and all tokens."""
        if "loss" in logs and self._parts:
            steps = max(1, self.state.global_step - self._parts_since)
            names = list(self._parts)
            values = self.accelerator.gather(torch.stack([self._parts[name].float() for name in names])[None]).mean(0)
            logs |= {name: value / steps for name, value in zip(names, values.tolist(), strict=True)}
            logs["rho_mean"] = float(self.selecting.selector.selector.rho_mean)
            self._parts = {}
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        self.selecting.save_pretrained(folder, state_dict)
        if self.processing_class is not None and (folder / MODEL).is_dir():
            self.processing_class.save_pretrained(folder / MODEL)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.selecting.load_pretrained(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
            return
        self.selecting.load_pretrained(self.state.best_model_checkpoint)
