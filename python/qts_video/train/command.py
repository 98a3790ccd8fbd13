"""``qts train``: a selector trained from files of questions."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from qts_video.answer import default_positions
from qts_video.data import Collator, RecordError, VideoQADataset
from qts_video.loading import FRAME_PIXELS, CommandError, first_line, given, load
from qts_video.methods import QTSplus
from qts_video.train import lite_command
from qts_video.train.arguments import QTSplusArguments
from qts_video.train.qtsplus import QTSplusTrainer

TAU_S, N_MAX = 0.5, 512
"""Of a new selector: the published recipe's."""


def run(arguments: argparse.Namespace) -> int:
    """Train, and write the selector into ``--output``. The log goes to stdout."""
    if arguments.trained == "flexselect-lite":
        return lite_command.run(arguments)
    _check(arguments)
    train, evaluation = (_dataset(arguments, files) for files in (arguments.data, arguments.eval_data))
    half = arguments.dtype == "bfloat16" or (
        arguments.dtype == "auto" and torch.cuda.is_available() and not arguments.cpu
    )
    # What an optimizer steps through stays in float32; LoRA and the selector see to that themselves.
    whole = arguments.stage == 2 and not arguments.lora_rank
    of_model = {"device": "cpu", "dtype": "bfloat16" if half and not whole else "float32"}
    model, processor, trained = load(argparse.Namespace(**vars(arguments) | of_model))
    selector = _selector(arguments, model, trained)
    positions = arguments.positions or default_positions(model, selector, trained)
    trainer = QTSplusTrainer(
        model,
        selector,
        _training(arguments, half, positions, evaluation is not None),
        Collator(processor, max_length=arguments.max_length, seconds_per_step=True),
        train,
        evaluation,
        processor,
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    trainer.save_model()
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise what can be known before the work starts."""
    if arguments.lora_rank and arguments.stage == 1:
        raise CommandError("--lora-rank belongs to --stage 2")
    if arguments.selector is not None:
        for name in ("scoring_layers", "reencode_layers"):
            if getattr(arguments, name) is not None:
                raise CommandError(f"--{name.replace('_', '-')} is of a new selector, without --selector")
    for name in ("eval_steps", "predictions"):
        if getattr(arguments, name) and arguments.eval_data is None:
            raise CommandError(f"--{name.replace('_', '-')} needs --eval-data")
    output = Path(arguments.output)
    if arguments.resume is None and ((output / "model.safetensors").exists() or any(output.glob("checkpoint-*"))):
        raise CommandError(f"{output} holds a training already: go on with --resume, or choose another --output")
    if arguments.resume is True and not any(output.glob("checkpoint-*")):
        raise CommandError(f"--resume: no checkpoint in {output}")
    if isinstance(arguments.resume, str) and not Path(arguments.resume).is_dir():
        raise CommandError(f"--resume: no folder {arguments.resume}")


def _dataset(arguments: argparse.Namespace, files: list[str] | None) -> VideoQADataset | None:
    if files is None:
        return None
    try:
        return VideoQADataset(
            files,
            media_root=arguments.media_root,
            on_bad="skip" if arguments.skip_bad else "raise",
            sampling=arguments.sampling,
            fps=arguments.fps,
            max_frames=arguments.max_frames,
            max_pixels=arguments.max_pixels or FRAME_PIXELS,
            frame_rate=arguments.frame_rate,
            seed=arguments.seed,
        )
    except (RecordError, OSError, ValueError) as error:
        raise CommandError(first_line(error)) from error


def _selector(arguments: argparse.Namespace, model: Any, trained: QTSplus | None) -> QTSplus:
    """The one named, the one that came with the model, or a new one."""
    options = given(arguments, "scoring_layers", "reencode_layers")
    try:
        if arguments.selector is not None:
            return QTSplus.from_pretrained(arguments.selector)
        if trained is not None and not options:
            return trained
        print("a new selector, made from the model's own layers", file=sys.stderr)
        return QTSplus.from_language_model(model, tau_s=TAU_S, n_max=N_MAX, seed=arguments.seed, **options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CommandError(f"selector: {first_line(error)}") from error


def _training(arguments: argparse.Namespace, half: bool, positions: str, evaluates: bool) -> QTSplusArguments:
    evaluation = "no" if not evaluates else "steps" if arguments.eval_steps else "epoch"
    return QTSplusArguments(
        output_dir=arguments.output,
        stage=arguments.stage,
        lora_rank=arguments.lora_rank,
        tau_s=arguments.tau_s,
        n_max=arguments.n_max,
        gate_noise=not arguments.no_gate_noise,
        lambda_squared=arguments.lambda_squared,
        lambda_linear=arguments.lambda_linear,
        lambda_stability=arguments.lambda_stability,
        positions=positions,
        predictions=arguments.predictions,
        learning_rate=arguments.learning_rate,
        warmup_share=arguments.warmup,
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation,
        gradient_checkpointing=arguments.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if arguments.gradient_checkpointing else None,
        seed=arguments.seed,
        bf16=half,
        use_cpu=arguments.cpu,
        dataloader_num_workers=arguments.workers,
        logging_steps=arguments.logging_steps,
        save_steps=arguments.save_steps,
        eval_strategy=evaluation,
        eval_steps=arguments.eval_steps,
        report_to=arguments.report_to,
    )
