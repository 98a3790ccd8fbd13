"""``qts train flexselect-lite``: a small selector learns from the layers of a big model."""

import argparse
import contextlib
import sys
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Subset
from transformers.trainer_utils import get_last_checkpoint

from qts_video.data import Collator, RecordError, VideoQADataset
from qts_video.lite import LiteConfig, LiteSelector
from qts_video.lite.pretrained import from_language_model
from qts_video.loading import FRAME_PIXELS, VIDEO_PIXELS, CommandError, first_line, given, load
from qts_video.train.lite import LiteTrainer, LiteTrainingArguments
from qts_video.train.lite_scores import LiteCollator, dump_scores
from qts_video.train.teacher import Teacher


def run(arguments: argparse.Namespace) -> int:
    """Train; the selector lies in ``--output`` then. The metrics of the last evaluation on stdout, the rest on
    stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        _check(arguments)
        args = _training_arguments(arguments)
        start = _last_checkpoint(arguments)
        dataset, held_out = (_read(arguments, files) for files in (arguments.data, arguments.eval_data))
        arguments.device = str(args.device)
        model, processor, _ = load(arguments)
        trainer = _make_trainer(arguments, args, model, processor, dataset, held_out)
        trainer.train(resume_from_checkpoint=start)
        trainer.save_model()
        metrics = {} if held_out is None else trainer.evaluate()
    if trainer.is_world_process_zero():
        print(f"{arguments.output}: {args.loss} loss, {trainer.state.global_step} steps")
        for name in sorted(metrics):
            if name.startswith(("eval_loss", "eval_spearman", "eval_recall")):
                print(f"{name.removeprefix('eval_'):<16}{metrics[name]:.4f}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise what can be known before the work starts."""
    if arguments.device not in (None, "cpu", "cuda"):
        raise CommandError(f"--device must be cpu or cuda (choose with CUDA_VISIBLE_DEVICES), got {arguments.device}")
    sized = arguments.hidden_size is not None or arguments.layers is not None
    for name, start in (("--lite", arguments.lite), ("--language-model", arguments.language_model)):
        if start is not None and sized:
            raise CommandError(f"{name} has its size: leave out --hidden-size and --layers")


def _training_arguments(arguments: argparse.Namespace) -> LiteTrainingArguments:
    on_cpu = arguments.device == "cpu" or not torch.cuda.is_available()
    options = {}
    if arguments.gradient_checkpointing:  # transformers 5.23 calls it by another name, and warns where it is given
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return LiteTrainingArguments(
        arguments.output,
        loss=arguments.loss,
        learning_rate=arguments.learning_rate,
        num_train_epochs=arguments.epochs,
        max_steps=arguments.max_steps or -1,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        eval_strategy="no" if arguments.eval_data is None else "epoch",
        save_steps=arguments.save_steps,
        logging_steps=10,
        dataloader_num_workers=arguments.workers,
        seed=arguments.seed,
        report_to=arguments.report_to,
        use_cpu=on_cpu,
        bf16=arguments.dtype == "bfloat16" or (arguments.dtype == "auto" and not on_cpu),
        **options,
    )


def _last_checkpoint(arguments: argparse.Namespace) -> str | None:
    if not arguments.resume:
        return None
    try:
        found = get_last_checkpoint(arguments.output)
    except FileNotFoundError:
        found = None
    if found is None:
        raise CommandError(f"--resume: {arguments.output} has no checkpoint")
    return found


def _read(arguments: argparse.Namespace, files: list[str] | None) -> VideoQADataset | None:
    if files is None:
        return None
    try:
        return VideoQADataset(
            files,
            media_root=arguments.media_root,
            fps=arguments.fps,
            max_frames=arguments.max_frames,
            min_frames=min(4, arguments.max_frames),
            max_pixels=arguments.max_pixels or FRAME_PIXELS,
            total_pixels=VIDEO_PIXELS,
        )
    except (OSError, RecordError) as error:
        raise CommandError(str(error)) from error


def _make_trainer(
    arguments: argparse.Namespace,
    args: LiteTrainingArguments,
    model: Any,
    processor: Any,
    dataset: VideoQADataset,
    held_out: VideoQADataset | None,
) -> LiteTrainer:
    collator = Collator(processor, train=False)
    options = given(arguments, "reduce", "query", "frames_per_set")
    try:
        teacher = Teacher(model, arguments.layer, tokenizer=processor, **options)
        student = _student(arguments, model)
        if arguments.teacher_scores is not None:
            for part in filter(None, (dataset, held_out)):
                mine = Subset(part, range(args.process_index, len(part), args.world_size))
                scores = dump_scores(teacher, collator, mine, arguments.teacher_scores)
            PartialState().wait_for_everyone()
            collator = LiteCollator(collator, scores)
        return LiteTrainer(student, teacher, args, collator, train_dataset=dataset, eval_dataset=held_out)
    except (ValueError, TypeError) as error:
        raise CommandError(f"flexselect-lite: {first_line(error)}") from error


def _student(arguments: argparse.Namespace, model: Any) -> LiteSelector:
    """In float32: a step of the learning rate is nothing in bfloat16."""
    start = arguments.lite or arguments.language_model
    if start is not None:
        try:
            if arguments.lite is not None:
                return LiteSelector.from_pretrained(start).float()
            return from_language_model(model, start, seed=arguments.seed)
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(f"{start}: {first_line(error)}") from error
    sizes = {} if arguments.layers is None else {"layers": arguments.layers}
    if arguments.hidden_size is not None:
        heads = arguments.hidden_size * LiteConfig.heads // LiteConfig.hidden_size
        sizes |= {
            "hidden_size": arguments.hidden_size,
            "intermediate_size": arguments.hidden_size * LiteConfig.intermediate_size // LiteConfig.hidden_size,
            "heads": max(1, heads),
            "kv_heads": 1 if heads % LiteConfig.kv_heads or heads == 0 else LiteConfig.kv_heads,
        }
    return LiteSelector.build(model, seed=arguments.seed, **sizes).float()
