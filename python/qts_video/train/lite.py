"""Training of a Lite selector (FlexSelect-Lite, arXiv 2506.00993): a small language model learns to order video tokens
as a middle layer of a big one does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from qts_video.lite import LiteSelector
from qts_video.methods.base import Videos, resolve_budget
from qts_video.train.lite_scores import LiteCollator
from qts_video.train.ranking import TEMPERATURE, l1_loss, rank_loss, recall, spearman
from qts_video.train.teacher import Teacher
from qts_video.weights import SINGLE

LOSSES = ("l1", "rank", "both")
_TRAINED_IN = (torch.float32, torch.float64)


@dataclass
class LiteTrainingArguments(TrainingArguments):
    """transformers' arguments, with the published learning rate and number of epochs as defaults, and those of the
    losses. The published 64 frames are the data set's."""

    learning_rate: float = 1e-5
    num_train_epochs: float = 1.0
    report_to: str | list[str] | None = "none"
    remove_unused_columns: bool | None = False
    ddp_find_unused_parameters: bool | None = False
    loss: str = field(
        default="rank",
        metadata={"help": "rank: 1 - Spearman; l1: distance of standardised log-scores; both: their sum"},
    )
    temperature: float = field(
        default=TEMPERATURE, metadata={"help": "width of the soft ranks, in standard deviations of the log-scores"}
    )
    set_batch_size: int | None = field(default=1, metadata={"help": "sets of frames in one forward of the student"})
    recall_at: tuple[float, ...] = field(
        default=(0.1, 0.25), metadata={"help": "shares of the tokens that evaluation counts the recall of"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if any(not 0 < ratio <= 1 for ratio in self.recall_at):
            raise ValueError(f"recall_at must be shares in (0, 1], got {self.recall_at}")


class LiteTrainer(Trainer):
    """Trains ``student`` on the scores of ``teacher``; every Trainer option works.

    The teacher's model is moved to the training device, stays frozen and in eval mode, and is neither in the optimizer
    nor in a checkpoint. Of it runs the vision tower, for the features that the student projects, and, where scores are
    not read from disk, the language model up to its reference layer.

    The loss of a batch is the mean over its samples of the mean over their videos. A checkpoint is what
    ``LiteSelector.save_pretrained`` writes, beside the trainer's own files: ``FlexSelect.lite`` loads it. Evaluation
    adds "spearman" and, for every share of ``recall_at``, "recall_at_<share>": that of the teacher's best tokens which
    are among as many of the student's.

    Args:
        student: in float32 (or float64); for less memory use ``bf16=True``, which computes in bfloat16 beside it.
        teacher: of the model that the student is for.
        args: None: the defaults, in "lite-output".
        data_collator: samples -> the model's inputs, without answers; ``LiteCollator`` adds scores from disk.
        options: of Trainer: train_dataset, eval_dataset, callbacks, optimizers.

    Raises:
        TypeError: arguments of another kind, or no Lite selector fits the model.
        ValueError: the student is of another family or vocabulary than the model, or in another dtype; scores on disk
            are of another teacher; or several GPUs are given to one process.
    """

    def __init__(
        self,
        student: LiteSelector,
        teacher: Teacher,
        args: LiteTrainingArguments | None = None,
        data_collator: Any = None,
        **options: Any,
    ) -> None:
        args = LiteTrainingArguments("lite-output") if args is None else args
        if not isinstance(args, LiteTrainingArguments):
            raise TypeError(f"args must be LiteTrainingArguments, got {type(args).__name__}")
        if data_collator is None:
            raise TypeError("data_collator is missing: qts_video.data.Collator(processor, train=False) makes inputs")
        student.check_fits(teacher.model)
        if student.dtype not in _TRAINED_IN:
            raise ValueError(
                f"the student must be trained in float32, got {student.dtype}, in which steps of the learning rate are "
                "rounded away: student.float(), and bf16=True to compute in bfloat16"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"one process can't train on {args.n_gpu} GPUs: start one a GPU (torchrun --nproc-per-node "
                f"{args.n_gpu}), or show it one alone (CUDA_VISIBLE_DEVICES=0)"
            )
        if isinstance(data_collator, LiteCollator):
            processor = getattr(data_collator.collator, "processor", None)
            data_collator.scores.check(teacher.settings(processor))
        student.requires_grad_(True)
        super().__init__(
            _Trained(student), args, data_collator, compute_metrics=_mean_metrics(args.recall_at), **options
        )
        self.student = student
        self.teacher = teacher
        teacher.model.to(args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, Any]]:
        """The loss; with ``return_outputs`` also "scores" and "teacher_scores" [sum M] and the "videos"."""
        inputs = dict(inputs)
        given, grids = inputs.pop("teacher_scores", None), inputs.pop("teacher_grids", None)
        videos = self.teacher.prefill(inputs)
        wanted = self.teacher.scores(videos) if given is None else _checked(given, grids, videos)
        context = replace(videos.context, vision=videos.context.vision.to(self.student.dtype))
        scores = model(
            replace(videos, context=context), **self.teacher.options, set_batch_size=self.args.set_batch_size
        )
        losses = self._losses(scores, wanted, videos)
        loss = _of_samples(losses, videos, torch.mean).mean()
        outputs = {"scores": scores.detach(), "teacher_scores": wanted, "videos": videos}
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The loss, and of each sample its metrics [B, 1 + len(recall_at)] (as "logits") beside an empty label."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        videos, scores, wanted = outputs["videos"], outputs["scores"], outputs["teacher_scores"]
        found = [spearman(scores, wanted, videos.cu_seqlens)]
        for ratio in self.args.recall_at:
            counts = [resolve_budget(length, ratio, None) for length in videos.lengths]
            found.append(recall(scores, wanted, counts, videos.cu_seqlens))
        metrics = torch.stack([_of_samples(metric, videos, torch.nanmean) for metric in found], 1)
        return loss, metrics, torch.zeros(len(metrics), device=metrics.device)

    def _losses(self, scores: torch.Tensor, wanted: torch.Tensor, videos: Videos) -> torch.Tensor:
        student, teacher = _logarithm(scores), _logarithm(wanted)
        borders, losses = videos.cu_seqlens, 0
        if self.args.loss in ("rank", "both"):
            losses = losses + rank_loss(student, teacher, borders, temperature=self.args.temperature)
        if self.args.loss in ("l1", "both"):
            losses = losses + l1_loss(student, teacher, borders)
        return losses

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        self.student.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / SINGLE
        if not path.is_file():
            raise FileNotFoundError(f"{resume_from_checkpoint} is no checkpoint: it has no {SINGLE}")
        (self.model if model is None else model).load_state_dict(load_file(path))


class _Trained(nn.Module):
    """The student as Trainer knows it: by its own names in a state dict, and without a config, which Trainer and its
    loggers take for one of transformers'."""

    accepts_loss_kwargs = False  # what it is given are no options of a loss, which is a mean over samples

    def __init__(self, student: LiteSelector) -> None:
        super().__init__()
        self.student = student
        self.gradient_checkpointing_enable = student.gradient_checkpointing_enable

    def forward(self, videos: Videos, **options: Any) -> torch.Tensor:
        return self.student(videos, **options)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.student.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.student.load_state_dict(*args, **kwargs)


def _logarithm(scores: torch.Tensor) -> torch.Tensor:
    """Of attention weights, which spread evenly on this scale alone. A weight of 0 counts as the smallest number."""
    return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()


def _of_samples(of_videos: torch.Tensor, videos: Videos, mean: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[B]: the mean over the videos of each sample of [V]. A batch is then worth the same however it is split among
    processes."""
    sample = torch.tensor(videos.sample).to(of_videos.device)
    return torch.stack([mean(of_videos[sample == number]) for number in range(max(videos.sample) + 1)])


def _checked(given: torch.Tensor, grids: torch.Tensor, videos: Videos) -> torch.Tensor:
    """Scores from disk, once they fit the prompt."""
    made = [tuple(grid) for grid in grids.tolist()]
    if made != videos.grids or len(given) != sum(videos.lengths):
        raise ValueError(
            f"the teacher's scores are of videos of grids {made}, and the prompt has {videos.grids}: were they made "
            "with another resolution?"
        )
    return given


def _mean_metrics(ratios: tuple[float, ...]) -> Callable[[EvalPrediction], Mapping[str, float]]:
    names = ["spearman", *(f"recall_at_{ratio:g}" for ratio in ratios)]

    def compute(prediction: EvalPrediction) -> Mapping[str, float]:
        means = torch.as_tensor(prediction.predictions).nanmean(0).tolist()
        return dict(zip(names, means, strict=True))

    return compute
