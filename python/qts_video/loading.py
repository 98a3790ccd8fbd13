"""What the options of the command line name: the video, the model, the selector."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from . import methods
from .adapters import find_adapter
from .checkpoints import load_model
from .dropin.versions import check_version
from .quota import frame_scorer
from .quota.sampler import read_sampled
from .video import Video, read_video

EMBEDDED = "embedded"
RELEVANCE = "relevance"

# qwen-vl-utils' own bounds, so that a video costs as many tokens here as there: 768 tokens of 28 x 28 pixels
# a frame, and 90 % of a context of 128,000 tokens for all pairs of frames.
FRAME_PIXELS = 768 * 28 * 28
VIDEO_PIXELS = 2 * int(0.9 * 128_000) * 28 * 28

# Of each method, the options that no other takes.
OWN_OPTIONS = {
    "qtsplus": ("selector",),
    "flexselect": ("layer", "reduce", "query", "frames_per_set", "lite"),
    "quota": ("scorer", "score_cache", "mode"),
}


class CommandError(Exception):
    """What was asked for cannot be had. The message is one line."""


def check_methods(arguments: argparse.Namespace, chosen: list[str]) -> None:
    """Raise CommandError where an option belongs to a method that was not ``chosen``, or two exclude each other."""
    for method, own in OWN_OPTIONS.items():
        for name in own:
            if getattr(arguments, name, None) is not None and method not in chosen:
                raise CommandError(f"--{name.replace('_', '-')} belongs to --method {method}, got {', '.join(chosen)}")
    if arguments.layer is not None and arguments.lite is not None:
        raise CommandError("--lite scores with a model of its own, without --layer")
    if arguments.scorer == RELEVANCE and arguments.score_cache is not None:
        raise CommandError(f"--score-cache keeps the scores of a model, and --scorer {RELEVANCE} has none")


def read(arguments: argparse.Namespace) -> Video:
    """The video, sampled; what was done to the picture is said on stderr."""
    video = (read_sampled if arguments.dynamic_frames else read_video)(
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
    return video


def load(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(model, processor, the selector that came with them or None), as the command line asks for them."""
    name = arguments.model
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise CommandError(f"model {name}: no such folder")
    device = _device(arguments.device)
    dtype = _dtype(arguments.dtype, device)
    transformers.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    try:
        check_version(transformers.__version__)
        if is_embedded(name):
            return _embedded(name, dtype, device)
        model, processor, trained = load_model(
            name, dtype=dtype, device=device, trust_remote_code=arguments.trust_remote_code
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CommandError(f"model {name}: {first_line(error)}") from error
    return model, processor, trained


def is_embedded(name: str) -> bool:
    """Whether ``--model`` names a built-in model: "embedded", or one that ``is_random``."""
    return name.split(":")[0] == EMBEDDED


def is_random(name: str) -> bool:
    """Whether ``--model`` names a built-in model with random weights: "embedded:FAMILY"."""
    return name.startswith(f"{EMBEDDED}:")


def _embedded(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, Any]:
    from . import embedded

    _, _, family = name.partition(":")
    if family:
        model, processor = embedded.build(family)
        print("the embedded model has random weights: what it selects and answers means nothing", file=sys.stderr)
        return model.to(device, dtype), processor, None
    model, processor, selector = embedded.load()
    print(
        "the embedded model knows the films of qts_video.miniworld and their questions, nothing else", file=sys.stderr
    )
    return model.to(device, dtype), processor, selector.to(device, dtype)


def choose(arguments: argparse.Namespace, method: str, model: Any, processor: Any, trained: Any) -> Any:
    """The selector that ``method`` names, with its budget; None for "none"."""
    budget = {"retention_ratio": arguments.retention_ratio, "max_tokens": arguments.max_tokens}
    if method == "none":
        return None
    if method == "uniform":
        return methods.Uniform(**budget)
    if method == "random":
        return methods.Random(**budget)
    if method == "flexselect":
        return _flexselect(arguments, budget, model)
    if method == "quota":
        return _quota(arguments, budget, model, processor)
    return _qtsplus(arguments, budget, model, trained)


def _qtsplus(arguments: argparse.Namespace, budget: dict[str, Any], model: Any, trained: Any) -> Any:
    if arguments.selector == "language-model":
        print("the selector is made from the model's own layers, untrained", file=sys.stderr)
        return methods.QTSplus.from_language_model(model, **budget)
    if arguments.selector is not None:
        try:
            selector = methods.QTSplus.from_pretrained(arguments.selector, **budget)
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(f"selector {arguments.selector}: {first_line(error)}") from error
        return selector.to(device=model.device, dtype=model.dtype)
    if trained is None:
        raise CommandError(
            f"method qtsplus: {arguments.model} holds no selector; give one with --selector PATH, try an untrained "
            "one with --selector language-model, or use --method uniform"
        )
    trained.retention_ratio, trained.max_tokens = budget["retention_ratio"], budget["max_tokens"]
    return trained


def _flexselect(arguments: argparse.Namespace, budget: dict[str, Any], model: Any) -> Any:
    from .flexselect import defaults, early_exit
    from .methods.flexselect import FlexSelect

    decoder = find_adapter(model).parts(model).decoder
    options = budget | given(arguments, "reduce", "query", "frames_per_set")
    if budget["retention_ratio"] is None and budget["max_tokens"] is None:
        _published(defaults.default_budget, model, decoder, "--max-tokens N")
    if arguments.lite is not None:
        try:
            selector = FlexSelect.lite(arguments.lite, **options, device=model.device, dtype=model.dtype)
            selector.selector.check_fits(model)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise CommandError(f"lite {arguments.lite}: {first_line(error)}") from error
        return selector
    layer = arguments.layer
    if layer is None:
        layer = _published(defaults.default_layer, model, decoder, "--layer N")
    try:
        early_exit.check_layers(decoder, [layer])
        return FlexSelect(layer=layer, **options)
    except (ValueError, TypeError) as error:
        raise CommandError(f"method flexselect: {first_line(error)}") from error


def _quota(arguments: argparse.Namespace, budget: dict[str, Any], model: Any, processor: Any) -> Any:
    name = arguments.scorer or frame_scorer.DEFAULT
    scorer, cache = name, {"cache_dir": arguments.score_cache}
    try:
        if name == "model":
            scorer = frame_scorer.FrameScorer(model, processor, **cache)
        elif name != RELEVANCE:
            scorer = frame_scorer.FrameScorer.from_pretrained(name, device=model.device, dtype=model.dtype, **cache)
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"scorer {name}: {first_line(error)}") from error
    options = given(arguments, "mode")
    if any(bound is not None for bound in budget.values()):
        options |= {"total_tokens": budget["max_tokens"], "retention_ratio": budget["retention_ratio"]}
    return methods.QuoTA(scorer, **options)


def show_frames(selector: Any, video: Video) -> None:
    """Give a selector that scores frames by their pictures those of ``video``, before every prompt. Any other is left
    alone."""
    scorer = getattr(selector, "scorer", None)
    if isinstance(scorer, frame_scorer.FrameScorer):
        scorer.bind([video.frames])


def _published(find: Callable[[Any, Any], int], model: Any, decoder: Any, option: str) -> int:
    """What is published for the model, or how to say it here."""
    try:
        return find(model, decoder)
    except ValueError as error:
        raise CommandError(f"method flexselect: {first_line(error)} (here: {option})") from error


def given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Of these options, those that were given."""
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise CommandError(f"device {name}: {first_line(error)}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
