"""``qts demo``: a film made on the spot, a small model trained on such films, answers with and without selection."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import embedded
from .answer import Answer, answer, prepare
from .methods import Uniform
from .miniworld.evaluate import one_of_each
from .miniworld.film import write_film
from .miniworld.questions import Question
from .miniworld.world import FPS, sample_scene
from .overlay import draw_selection
from .video import Video, read_video

FILM, SECONDS = 0, 60
"""Which film of the miniature world's test split, and how long it is. The model was trained on other films."""
NEW_TOKENS = 4
BAR = "{desc:<24}{bar:30} {elapsed}"


def run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    scene = sample_scene("test", FILM, SECONDS)
    questions = one_of_each(scene)
    with tqdm(total=3 + len(questions), desc="film", leave=False, disable=None, bar_format=BAR) as bar:
        film = write_film(folder / "film.mp4", scene)
        video = read_video(film, fps=FPS)
        bar.update()
        bar.set_description("model")
        model, processor, trained = embedded.load()
        trained.retention_ratio = arguments.retention_ratio
        methods = {"none": None, "uniform": Uniform(retention_ratio=arguments.retention_ratio), "qtsplus": trained}
        # The first calls pay for what later ones reuse; the table is about the later ones.
        few = prepare(processor, _first_frames(video, 2), questions[0].text)
        for selector in methods.values():
            answer(model, processor, few, selector, max_new_tokens=1)
        bar.update()
        said: list[dict[str, Answer]] = []
        for question in questions:
            bar.set_description(question.kind)
            inputs = prepare(processor, video, question.text)
            said.append(
                {
                    name: answer(model, processor, inputs, selector, max_new_tokens=NEW_TOKENS)
                    for name, selector in methods.items()
                }
            )
            bar.update()
        bar.set_description("picture")
        picture = _draw(folder / "selection.png", video, questions[0], said[0])
        bar.update()
    print(_text(model, video, questions, said, picture))
    sys.stdout.flush()
    return 0


def _draw(path: Path, video: Video, question: Question, answers: dict[str, Answer]) -> Path:
    name, last = list(answers.items())[-1]
    return draw_selection(
        path,
        video.frames,
        last.report.videos[0],
        title=f"“{question.text}”  {last.text}",
        subtitle=f"{name} kept {last.kept:,} of {last.tokens:,} video tokens ({last.kept / last.tokens:.1%}).",
    )


def _text(model: Any, video: Video, questions: list[Question], said: list[dict[str, Answer]], picture: Path) -> str:
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    answers = said[0]
    full, (name, last) = answers["none"], list(answers.items())[-1]
    faster = full.timings["prefill"] / (last.timings["selection"] + last.timings["prefill"])
    height, width = video.frames.shape[-2:]
    lines = [
        "",
        f"A Qwen2.5-VL with {parameters:.1f} million weights, trained on films of moving shapes, watched one that it "
        "never saw.",
        "",
        f"film      {video.source}: {video.duration:.0f} s, {len(video.frames)} frames of {width}x{height} sampled",
        f"device    {_device(model)}",
        "",
        *table(answers),
        "",
        f"{name}: {last.tokens / last.kept:.1f}x fewer video tokens for the language model, and choosing and reading "
        f"them took {faster:.1f}x less time.",
        "",
        *_answers(questions, said),
        "",
        f"picture   {picture}",
    ]
    return "\n".join(lines)


def _answers(questions: list[Question], said: list[dict[str, Answer]]) -> list[str]:
    """One line a question: the truth, and what was answered with each method."""
    names = list(said[0])
    rows = [("question", "truth", *names)]
    rows += [
        (question.text, question.answer, *(answers[name].text for name in names))
        for question, answers in zip(questions, said, strict=True)
    ]
    right = [sum(answers[name].text == q.answer for q, answers in zip(questions, said, strict=True)) for name in names]
    rows.append(("right", str(len(questions)), *map(str, right)))
    return _aligned(rows, str.ljust)


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
    return _aligned(rows, str.rjust)


def _aligned(rows: list[tuple[str, ...]], justify: Callable[[str, int], str]) -> list[str]:
    """Columns of one width, all but the first by ``justify``; a rule under the first row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(justify, row[1:], widths[1:])]).rstrip() for row in rows]
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
