"""``qts ask``: one question about one video, from a checkpoint on disk or on the hub."""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from . import methods
from .answer import Answer, answer, prepare
from .checkpoints import load_model
from .demo import mebibytes
from .dropin.versions import check_version
from .video import Video, read_video

# qwen-vl-utils' own bounds, so that a video costs as many tokens here as there: 768 tokens of 28 x 28 pixels
# a frame, and 90 % of a context of 128,000 tokens for all pairs of frames.
FRAME_PIXELS = 768 * 28 * 28
VIDEO_PIXELS = 2 * int(0.9 * 128_000) * 28 * 28


class AskError(Exception):
    """What was asked for cannot be had. The message is one line."""


def run(arguments: argparse.Namespace) -> int:
    """Answer on stdout, everything else on stderr; with ``--json`` one object on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        result, video = _run(arguments)
    if arguments.json:
        print(json.dumps(as_json(arguments, result, video)))
    else:
        print(result.text)
        sys.stdout.flush()
        print(_summary(arguments, result, video), file=sys.stderr)
    return 0


def _run(arguments: argparse.Namespace) -> tuple[Answer, Video]:
    if arguments.method == "none" and arguments.save_overlay:
        raise AskError("--save-overlay draws what was kept: choose a --method other than none")
    if arguments.save_overlay:
        import matplotlib  # noqa: F401  (if it is missing, say so before the work and not after)
    video = read_video(
        arguments.video,
        fps=arguments.fps,
        max_frames=arguments.max_frames,
        max_pixels=arguments.max_pixels or FRAME_PIXELS,
        total_pixels=VIDEO_PIXELS,
        frame_rate=arguments.frame_rate,
        reader=arguments.reader,
        progress=True,
    )
    for note in video.notes:
        print(f"{video.source}: {note}", file=sys.stderr)
    model, processor, trained = load(arguments)
    selector = choose(arguments, model, trained)
    if arguments.positions is None:
        arguments.positions = "compact" if selector is not None and selector is trained else "original"
    inputs = prepare(processor, video, arguments.question)
    result = answer(
        model,
        processor,
        inputs,
        selector,
        positions=arguments.positions,
        max_new_tokens=arguments.max_new_tokens,
    )
    if arguments.save_overlay:
        from .overlay import draw_selection

        draw_selection(
            arguments.save_overlay,
            video.frames,
            result.report.videos[0],
            title=f"“{arguments.question}”",
            subtitle=f"{arguments.method} kept {result.kept:,} of {result.tokens:,} video tokens "
            f"({result.kept / result.tokens:.1%}) of {Path(video.source).name}",
        )
    return result, video


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(model, processor, the selector that came with them or None), as the command line asks for them."""
    name = arguments.model
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise AskError(f"model {name}: no such folder")
    device = _device(arguments.device)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        check_version(transformers.__version__)
        model, processor, trained = load_model(name, dtype=_dtype(arguments.dtype, device), device=device)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise AskError(f"model {name}: {_first_line(error)}") from error
    return model, processor, trained


def choose(arguments: argparse.Namespace, model: Any, trained: Any) -> Any:
    """The selector that ``--method`` names, with its budget; None for "none"."""
    budget = {"retention_ratio": arguments.retention_ratio, "max_tokens": arguments.max_tokens}
    if arguments.method == "none":
        return None
    if arguments.method == "uniform":
        return methods.Uniform(**budget)
    if arguments.method == "random":
        return methods.Random(**budget)
    if arguments.selector == "language-model":
        print("the selector is made from the model's own layers, untrained", file=sys.stderr)
        return methods.QTSplus.from_language_model(model, **budget)
    if arguments.selector is not None:
        try:
            selector = methods.QTSplus.from_pretrained(arguments.selector, **budget)
        except (OSError, ValueError, RuntimeError) as error:
            raise AskError(f"selector {arguments.selector}: {_first_line(error)}") from error
        return selector.to(device=model.device, dtype=model.dtype)
    if trained is None:
        raise AskError(
            f"method qtsplus: {arguments.model} holds no selector; give one with --selector PATH, try an untrained "
            "one with --selector language-model, or use --method uniform"
        )
    trained.retention_ratio, trained.max_tokens = budget["retention_ratio"], budget["max_tokens"]
    return trained


def as_json(arguments: argparse.Namespace, result: Answer, video: Video) -> dict[str, Any]:
    """What ``--json`` prints. ``kept_tokens`` is null where nothing was selected."""
    kept = None
    if result.report is not None:
        one = result.report.videos[0]
        kept = {
            "index": one.indices.tolist(),
            "frame": one.frame.tolist(),
            "row": one.row.tolist(),
            "column": one.column.tolist(),
            "seconds": [round(s, 4) for s in one.seconds.tolist()],
            "score": None if one.scores is None else one.scores[one.indices].tolist(),
        }
    return {
        "answer": result.text,
        "question": arguments.question,
        "video": video.source,
        "model": arguments.model,
        "method": arguments.method,
        "positions": arguments.positions,
        "tokens": result.tokens,
        "kept": result.kept,
        "retention_ratio": result.kept / result.tokens,
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": result.generated_tokens,
        "timings": result.timings,
        "peak_memory_bytes": result.measurement.peak_bytes,
        "grid": None if result.report is None else list(result.report.videos[0].grid),
        "frames": {"seconds": video.seconds, "sampled_fps": video.sampled_fps, "notes": video.notes},
        "kept_tokens": kept,
    }


def _summary(arguments: argparse.Namespace, result: Answer, video: Video) -> str:
    times = {k: f"{k} {v:.2f} s" for k, v in result.timings.items() if k != "selection" or result.report is not None}
    lines = [
        "",
        f"video   {len(video.frames)} frames at {video.sampled_fps:.3g} a second, "
        f"{video.frames.shape[-1]}x{video.frames.shape[-2]}, {video.duration:.1f} s",
        f"tokens  {result.kept:,} of {result.tokens:,} video tokens ({result.kept / result.tokens:.1%}), "
        f"method {arguments.method}",
        f"time    {', '.join(times.values())}",
        f"memory  {mebibytes(result.measurement.peak_bytes)} on top of the model",
    ]
    if arguments.save_overlay:
        lines.append(f"picture {arguments.save_overlay}")
    return "\n".join(lines)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise AskError(f"device {name}: {_first_line(error)}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
