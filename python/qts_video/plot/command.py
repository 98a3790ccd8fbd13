"""``qts plot``: measure what a picture shows, draw it, and say where it is."""

import argparse
import contextlib
import random
import shlex
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qts_video.answer import answer, default_positions, prepare, seen_frames
from qts_video.cache import VideoCache
from qts_video.dropin.report import VideoReport
from qts_video.loading import CommandError, check_methods, choose, given, is_random, load, read, show_frames
from qts_video.video import Video

from . import needle as needles
from .heatmap import heatmap_page
from .layers import resolve_layers
from .page import Page, check_output, write
from .probe import Probe, number_of_layers
from .recall import best_layer, recall_at_k, recall_page
from .timeline import timeline, timeline_page

HEATMAP_LAYERS = 4
MAX_PANELS = 16
TRIALS = 5


def run(arguments: argparse.Namespace) -> int:
    """Write the picture; its name, and what is found, on stdout, everything else on stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            check_output(arguments.output)
        except ValueError as error:
            raise CommandError(str(error)) from error
        import matplotlib  # noqa: F401  (if it is missing, say so before the work and not after)

        page, lines = {"heatmap": _heatmap, "timeline": _timeline, "recall": _recall}[arguments.picture](arguments)
        path = write(arguments.output, page)
    print("\n".join([*lines, f"picture {path}"]))
    return 0


def _heatmap(arguments: argparse.Namespace) -> tuple[Page, list[str]]:
    if arguments.frames > MAX_PANELS:
        raise CommandError(f"--frames: at most {MAX_PANELS} fit side by side, got {arguments.frames}")
    video = read(arguments)
    model, processor, _ = load(arguments)
    probe = _probe(arguments, model, HEATMAP_LAYERS)
    one = _look(arguments, model, processor, video, arguments.question, probe)
    page = heatmap_page(
        seen_frames(processor, video.frames),
        one.frame_seconds,
        probe.relevance,
        one.grid,
        title=f"“{arguments.question}”",
        subtitle=_subtitle(arguments, f"{Path(video.source).name}: relevance by layer{probe}"),
        max_panels=arguments.frames,
    )
    return page, []


def _timeline(arguments: argparse.Namespace) -> tuple[Page, list[str]]:
    check_methods(arguments, arguments.method)
    video = read(arguments)
    model, processor, trained = load(arguments)
    selectors = {method: choose(arguments, method, model, processor, trained) for method in arguments.method}
    rows, cache = [], VideoCache()
    for question in arguments.questions:
        inputs = prepare(processor, video, question, model)
        for method, selector in selectors.items():
            show_frames(selector, video)
            positions = arguments.positions or default_positions(model, selector, trained)
            result = answer(
                model,
                processor,
                inputs,
                selector,
                positions=positions,
                max_new_tokens=1,
                cache=cache,
                vision_chunk_frames=arguments.vision_chunk_frames,
            )
            name = f"{method}, “{question}”" if len(arguments.questions) > 1 else method
            rows.append(timeline(name, result.report.videos[0]))
    one = len(arguments.questions) == 1
    page = timeline_page(
        rows,
        title=f"“{arguments.questions[0]}”" if one else f"{len(arguments.questions)} questions",
        subtitle=_subtitle(arguments, f"Kept tokens of {Path(video.source).name} over time"),
    )
    return page, [row.heading for row in rows]


def _recall(arguments: argparse.Namespace) -> tuple[Page, list[str]]:
    trials = _check_needle(arguments)
    video = _read_haystack(arguments)
    height, width = video.frames.shape[-2:]
    picture = None if arguments.needle is None else needles.read_needle(arguments.needle, height, width)
    model, processor, _ = load(arguments)
    probe = _probe(arguments, model, None)
    per_step = needles.frames_per_step(processor)
    steps = -(-len(video.frames) // per_step)
    chance = random.Random(arguments.seed)
    recalls: dict[int, list[float]] = {layer: [] for layer in probe.layers}
    for _ in tqdm(range(trials), desc="needles", leave=False, disable=None):
        drawn, about = (picture, "") if picture is not None else needles.make_needle(height, width, chance)
        question = arguments.question or about
        step = chance.randrange(steps) if arguments.at is None else _step(video, arguments.at, per_step)
        one = _look(arguments, model, processor, needles.plant(video, drawn, step, per_step), question, probe)
        if one.grid[0] != steps:
            raise CommandError(
                f"the needle can't be located: {len(video.frames)} frames were expected to make {steps} steps of the "
                f"token grid, the model made {one.grid[0]}"
            )
        tokens = one.grid[1] * one.grid[2]
        planted = torch.arange(step * tokens, (step + 1) * tokens)
        for layer, scores in probe.relevance.items():
            recalls[layer].append(recall_at_k(scores, planted))
    page = recall_page(
        recalls,
        tokens,
        1 / steps,
        title="Which layer finds the needle?",
        subtitle=_subtitle(
            arguments,
            f"One step of {steps} in {Path(video.source).name} is replaced by a picture that the question is about; "
            f"trials {trials}, seed {arguments.seed}{probe}",
        ),
    )
    return page, _found(arguments, page, recalls)


def _read_haystack(arguments: argparse.Namespace) -> Video:
    """The video, or the demo's film."""
    if arguments.video is not None:
        return read(arguments)
    from qts_video.film import make_film

    with tempfile.TemporaryDirectory() as folder:
        film = make_film(Path(folder) / "film.mp4")
        return replace(read(argparse.Namespace(**vars(arguments) | {"video": str(film)})), source="the demo's film")


def _check_needle(arguments: argparse.Namespace) -> int:
    """The number of trials."""
    if arguments.needle is not None and arguments.question is None:
        raise CommandError("--needle: give a --question that only this picture answers")
    same = arguments.needle is not None and arguments.at is not None
    if same and (arguments.trials or 1) > 1:
        raise CommandError("--trials: with both --needle and --at every trial is the same one")
    return 1 if same else arguments.trials or TRIALS


def _step(video: Video, seconds: float, per_step: int) -> int:
    try:
        return needles.step_at(video, seconds, per_step)
    except ValueError as error:
        raise CommandError(str(error)) from error


def _found(arguments: argparse.Namespace, page: Page, recalls: dict[int, list[float]]) -> list[str]:
    table, best = page.tables[0], best_layer(recalls)
    lines = [table.caption, *("  ".join(cell.rjust(7) for cell in row) for row in (table.header, *table.rows))]
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in _relevance(arguments).items())
    use = f"qts ask VIDEO QUESTION --model {shlex.quote(arguments.model)} --method flexselect --layer {best}{options}"
    return [*lines, f"best layer: {best}", f"use it: {use}"]


def _probe(arguments: argparse.Namespace, model: Any, default: int | None) -> Probe:
    total = number_of_layers(model)
    try:
        layers = resolve_layers(arguments.layers, total, default=default or total)
    except ValueError as error:
        raise CommandError(f"--layers: {error}") from error
    return Probe(layers, **_relevance(arguments))


def _relevance(arguments: argparse.Namespace) -> dict[str, Any]:
    return given(arguments, "reduce", "query", "frames_per_set")


def _look(
    arguments: argparse.Namespace, model: Any, processor: Any, video: Video, question: str, probe: Probe
) -> VideoReport:
    """Run ``probe`` on the prompt; the report of the video."""
    inputs = prepare(processor, video, question, model)
    frames = arguments.vision_chunk_frames
    return answer(model, processor, inputs, probe, max_new_tokens=1, vision_chunk_frames=frames).report.videos[0]


def _subtitle(arguments: argparse.Namespace, text: str) -> str:
    if not is_random(arguments.model):
        return f"{text}. {arguments.model}."
    return f"{text}.\nThe weights are random: this shows how it works, not what a trained model would look at."
