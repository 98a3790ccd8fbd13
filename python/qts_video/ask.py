"""``qts ask``: questions about one video, from a checkpoint on disk or on the hub."""

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .answer import Answer, answer, default_positions, prepare, prompt_length, seen_frames
from .cache import VideoCache
from .demo import mebibytes
from .loading import CommandError, check_methods, choose, load, read, show_frames
from .video import Video


def run(arguments: argparse.Namespace) -> int:
    """Answers on stdout, everything else on stderr; with ``--json`` one object a line and question on stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        _check(arguments)
        video = read(arguments)
        model, processor, trained = load(arguments)
        selector = choose(arguments, arguments.method, model, processor, trained)
        if arguments.positions is None:
            arguments.positions = default_positions(model, selector, trained)
    several = len(arguments.questions) > 1
    cache = VideoCache() if several else None
    for number, question in enumerate(arguments.questions):
        with contextlib.redirect_stdout(sys.stderr):
            prompt = prepare(processor, video, question, model)
            if number == 0 and arguments.positions == "original":
                _warn_of_length(model, prompt_length(model, prompt, selector))
            show_frames(selector, video)
            result = answer(
                model,
                processor,
                prompt,
                selector,
                positions=arguments.positions,
                max_new_tokens=arguments.max_new_tokens,
                cache=cache,
                vision_chunk_frames=arguments.vision_chunk_frames,
            )
            if number == 0 and arguments.positions == "compact":  # what is dropped takes no positions
                _warn_of_length(model, result.prompt_tokens - result.tokens + result.kept)
            if arguments.save_overlay:
                _draw(arguments, question, result, video, seen_frames(processor, video.frames))
        if arguments.json:
            print(json.dumps(as_json(arguments, question, result, video)), flush=True)
            continue
        if several:
            print(f"{question}\n{result.text}\n", flush=True)
        else:
            print(result.text, flush=True)
        print(_summary(arguments, result, None if number else video), file=sys.stderr)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise what can be known before the work starts."""
    check_methods(arguments, [arguments.method])
    if not arguments.save_overlay:
        return
    if arguments.method == "none":
        raise CommandError("--save-overlay draws what was kept: choose a --method other than none")
    if len(arguments.questions) > 1:
        raise CommandError("--save-overlay draws one question; 'qts plot timeline' draws several")
    import matplotlib  # noqa: F401  (if it is missing, say so before the work and not after)


def _warn_of_length(model: Any, tokens: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and tokens > context:
        print(
            f"the prompt has {tokens:,} tokens and the model was made for {context:,}: use fewer --max-frames, or keep "
            "few of them with --positions compact",
            file=sys.stderr,
        )


def _draw(arguments: argparse.Namespace, question: str, result: Answer, video: Video, frames: torch.Tensor) -> None:
    from .overlay import draw_selection

    draw_selection(
        arguments.save_overlay,
        frames,
        result.report.videos[0],
        title=f"“{question}”",
        subtitle=f"{arguments.method} kept {result.kept:,} of {result.tokens:,} video tokens "
        f"({result.kept / result.tokens:.1%}) of {Path(video.source).name}",
    )


def as_json(arguments: argparse.Namespace, question: str, result: Answer, video: Video) -> dict[str, Any]:
    """What ``--json`` prints of one question. ``kept_tokens`` is null where nothing was selected."""
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
        "question": question,
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
        "notes": [] if result.report is None else list(result.report.notes),
        "grid": None if result.report is None else list(result.report.videos[0].grid),
        "frames": {"seconds": video.seconds, "sampled_fps": video.sampled_fps, "notes": video.notes},
        "kept_tokens": kept,
    }


def _summary(arguments: argparse.Namespace, result: Answer, video: Video | None) -> str:
    """What one answer took. ``video`` None: it was described before."""
    times = {k: f"{k} {v:.2f} s" for k, v in result.timings.items() if k != "selection" or result.report is not None}
    lines = [""]
    if video is not None:
        lines.append(
            f"video   {len(video.frames)} frames at {video.sampled_fps:.3g} a second, "
            f"{video.frames.shape[-1]}x{video.frames.shape[-2]}, {video.duration:.1f} s"
        )
    lines += [
        f"tokens  {result.kept:,} of {result.tokens:,} video tokens ({result.kept / result.tokens:.1%}), "
        f"method {arguments.method}",
        f"time    {', '.join(times.values())}",
        f"memory  {mebibytes(result.measurement.peak_bytes)} on top of the model",
    ]
    if result.report is not None:
        lines += [f"note    {note}" for note in result.report.notes]
    if arguments.save_overlay:
        lines.append(f"picture {arguments.save_overlay}")
    return "\n".join(lines)
