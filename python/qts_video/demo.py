"""``qts demo``: a film made on the spot, a small model with random weights, answers with and without selection."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import embedded
from .answer import Answer, answer, prepare
from .film import make_film
from .methods import QTSplus, Uniform
from .overlay import draw_selection
from .video import Video, read_video

QUESTION = "Which colour is the shape that moves?"
FPS = 4.0
NEW_TOKENS = 8


def run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=7, desc="film", leave=False, disable=None, bar_format="{desc:<24}{bar:30} {elapsed}") as bar:
        film = make_film(folder / "film.mp4")
        video = read_video(film, fps=FPS)
        bar.update()
        bar.set_description("model")
        model, processor = embedded.build()
        inputs = prepare(processor, video, QUESTION)
        methods = _methods(model, arguments.retention_ratio)
        # The first calls pay for what later ones reuse; the table is about the later ones.
        few = prepare(processor, _first_frames(video, 2), QUESTION)
        for selector in methods.values():
            answer(model, processor, few, selector, max_new_tokens=1)
        bar.update()
        answers: dict[str, Answer] = {}
        for name, selector in methods.items():
            bar.set_description(f"answer, {name}")
            answers[name] = answer(model, processor, inputs, selector, max_new_tokens=NEW_TOKENS)
            bar.update()
        bar.set_description("picture")
        picture = _draw(folder / "selection.png", video, answers)
        bar.update()
    print(_text(model, video, answers, picture))
    sys.stdout.flush()
    return 0


def _methods(model: Any, retention_ratio: float) -> dict[str, Any]:
    return {
        "none": None,
        "uniform": Uniform(retention_ratio=retention_ratio),
        "qtsplus": QTSplus.from_language_model(model, retention_ratio=retention_ratio),
    }


def _draw(path: Path, video: Video, answers: dict[str, Answer]) -> Path:
    name, last = list(answers.items())[-1]
    return draw_selection(
        path,
        video.frames,
        last.report.videos[0],
        title=f"“{QUESTION}”",
        subtitle=f"{name} kept {last.kept:,} of {last.tokens:,} video tokens ({last.kept / last.tokens:.1%}). "
        "The weights are random: this shows how selection works, not what a trained selector would choose.",
    )


def _text(model: Any, video: Video, answers: dict[str, Answer], picture: Path) -> str:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    full, (name, last) = answers["none"], list(answers.items())[-1]
    faster = full.timings["prefill"] / (last.timings["selection"] + last.timings["prefill"])
    height, width = video.frames.shape[-2:]
    lines = [
        "",
        f"A Qwen2.5-VL with {parameters:.1f} million RANDOM weights watched a film that was made just now.",
        "What it selects and answers means nothing; the code, the token counts, the times and the memory are real.",
        "",
        f"film      {video.source}: {video.duration:.0f} s, {len(video.frames)} frames of {width}x{height} sampled",
        f"question  {QUESTION}",
        f"device    {_device(model)}",
        "",
        *table(answers),
        "",
        f"{name}: {last.tokens / last.kept:.1f}x fewer video tokens for the language model, and choosing and reading "
        f"them took {faster:.1f}x less time.",
        "",
        *(f"answer    {name}: {one.text!r}" for name, one in answers.items()),
        "",
        f"picture   {picture}",
    ]
    return "\n".join(lines)


def table(answers: dict[str, Answer]) -> list[str]:
    """One line a method, under a header."""
    header = ("method", "video tokens", "kept", "retention", "vision", "selection", "prefill", "total", "peak memory")
    rows = [header]
    for name, one in answers.items():
        seconds = {stage: f"{took:.2f} s" for stage, took in one.timings.items()}
        rows.append(
            (
                name,
                f"{one.tokens:,}",
                f"{one.kept:,}",
                f"{one.kept / one.tokens:.1%}",
                seconds["vision"],
                seconds["selection"] if one.report else "-",
                seconds["prefill"],
                seconds["total"],
                mebibytes(one.measurement.peak_bytes),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.0f} MiB"


def _device(model: Any) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device.type}, {torch.get_num_threads()} threads"


def _first_frames(video: Video, count: int) -> Video:
    return Video(
        frames=video.frames[:count],
        seconds=video.seconds[:count],
        sampled_fps=video.sampled_fps,
        frame_indices=video.frame_indices[:count],
        total_frames=video.total_frames,
        duration=video.duration,
        source=video.source,
        backend=video.backend,
    )
