"""The options that several commands share, and what their values must be. Needs nothing but the standard library."""

import argparse
import math

METHODS = ("qtsplus", "flexselect", "quota", "uniform", "random", "none")


def add_video(parser: argparse.ArgumentParser, **options: str) -> None:
    parser.add_argument("video", metavar="VIDEO", help="video file, or a folder of images", **options)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="a checkpoint of a known video model, a whole QTSplus checkpoint, or 'embedded': a small built-in "
        "Qwen2.5-VL that knows films of coloured shapes (docs/miniworld.md), with its selector; 'embedded:FAMILY' has "
        "random weights, and its answers mean nothing",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that a checkpoint brings with it (InternVLChatModel)",
    )


def add_budget(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How many tokens to keep; returns the group, for the options of the methods."""
    selection = parser.add_argument_group("selection")
    budget = selection.add_mutually_exclusive_group()
    budget.add_argument(
        "--retention-ratio", type=ratio, metavar="R", help="share of the video tokens to keep, in (0, 1]"
    )
    budget.add_argument("--max-tokens", type=count, metavar="N", help="most video tokens to keep")
    return selection


def add_methods(selection: argparse._ArgumentGroup) -> None:
    """The options of single methods."""
    selection.add_argument(
        "--selector",
        metavar="PATH",
        help="qtsplus: a checkpoint folder or hub id, or 'language-model' for an untrained selector made from the "
        "model's own layers (default: the one in --model)",
    )
    selection.add_argument(
        "--layer",
        type=index,
        metavar="N",
        help="flexselect: the layer, counted from 0, whose attention is the relevance (default: the published one of "
        "the model; 'qts plot recall' finds the best one of any)",
    )
    add_relevance(selection, "flexselect: ")
    selection.add_argument(
        "--lite", metavar="PATH", help="flexselect: a trained small scorer (a checkpoint folder or hub id)"
    )
    selection.add_argument(
        "--scorer",
        metavar="PATH_OR_HUB_ID",
        help="quota: the image-text model that scores frames, 'model' for the one that answers, or 'relevance' for no "
        "model at all (default: Qwen/Qwen2-VL-2B-Instruct)",
    )
    selection.add_argument(
        "--score-cache", metavar="FOLDER", help="quota: keep scores there, so that another run scores nothing"
    )
    selection.add_argument(
        "--mode",
        choices=("bilinear", "adaptive_avg", "linspace", "merge", "merge_separable"),
        help="quota: how a frame's tokens become fewer (default: bilinear)",
    )
    selection.add_argument(
        "--positions",
        choices=("original", "compact"),
        help="kept tokens keep their places in time and space, or close ranks (default: compact with the selector of "
        "a whole QTSplus checkpoint, which was trained so; else original)",
    )


def add_relevance(group: argparse._ArgumentGroup, method: str = "") -> None:
    """How the attention of a layer becomes relevance."""
    group.add_argument(
        "--reduce",
        choices=("max", "mean"),
        help=f"{method}over heads and text tokens, take the largest attention or the mean (default: max)",
    )
    group.add_argument(
        "--query",
        choices=("prompt", "question"),
        help=f"{method}whose attention: all text behind the video, or the question's alone (default: prompt)",
    )
    group.add_argument(
        "--frames-per-set",
        type=count,
        metavar="N",
        help=f"{method}most steps of the token grid scored at a time; more are split by stride (default: 64)",
    )


def add_records(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What a file of questions is; returns the group."""
    data = parser.add_argument_group("data")
    data.add_argument(
        "--media-root", metavar="DIR", help="folder from which the file names its videos (default: the file's own)"
    )
    data.add_argument(
        "--format",
        choices=("auto", "vscq", "vqa", "llava_video_178k"),
        default="auto",
        help="of the file's records (default: as the first one looks)",
    )
    return data


def add_data(parser: argparse.ArgumentParser) -> None:
    """Which records of a file, and which frames of their videos."""
    data = add_records(parser)
    data.add_argument(
        "--sampling",
        choices=("uniform", "random", "middle"),
        default="uniform",
        help="frames from the start, a random place or the middle of equal stretches (default: %(default)s)",
    )


def add_reading(parser: argparse.ArgumentParser, max_frames: int = 768) -> None:
    """How the video becomes frames."""
    reading = parser.add_argument_group("reading the video")
    reading.add_argument(
        "--fps", type=rate, default=2.0, help="sampled frames a second, by time stamps (default: %(default)s)"
    )
    reading.add_argument(
        "--max-frames",
        type=count,
        default=max_frames,
        metavar="N",
        help="most sampled frames, spread over the whole video (default: %(default)s)",
    )
    reading.add_argument(
        "--dynamic-frames",
        action="store_true",
        help="in place of --fps: 96 frames, and 64 more for every hour, at most --max-frames (QuoTA's sampler)",
    )
    reading.add_argument(
        "--max-pixels", type=count, metavar="N", help="pixels a frame is shrunk to (default: 768 tokens of 28x28)"
    )
    reading.add_argument(
        "--frame-rate", type=rate, metavar="FPS", help="rate at which a folder's images were taken (default: --fps)"
    )
    reading.add_argument(
        "--reader", choices=("auto", "pyav", "qwen-vl-utils"), default="auto", help="default: PyAV, else qwen-vl-utils"
    )


def add_running(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where and in which precision the model runs; returns the group."""
    running = parser.add_argument_group("running")
    running.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    running.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    return running


def add_vision_chunks(running: argparse._ArgumentGroup) -> None:
    running.add_argument(
        "--vision-chunk-frames",
        type=count,
        metavar="N",
        help="encode at most N frames of the video at a time, for a long one that runs out of memory in the vision "
        "tower (default: all at once)",
    )


def ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text}")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected frames a second above 0, got {text}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, at least 0, got {text}")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def index(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, got {text}")
    return value
