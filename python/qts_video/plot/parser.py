"""The command line of ``qts plot``. Needs nothing but the standard library."""

import argparse

from qts_video import options

from .layers import layer_ranges

EXAMPLES = {
    "heatmap": """\
examples:
  qts plot heatmap film.mp4 "Who opens the door?" --model Qwen/Qwen2.5-VL-7B-Instruct --layers 8,20,27 --output heat.png
  qts plot heatmap film.mp4 "Who opens the door?" --model embedded --layers all --output heat.html
""",
    "timeline": """\
examples:
  qts plot timeline film.mp4 "Who opens the door?" "When does it rain?" --model Qwen/Qwen2.5-VL-7B-Instruct \\
      --method flexselect --layer 20 --max-tokens 7040 --output kept.png
  qts plot timeline film.mp4 "What moves?" --model embedded --method uniform,flexselect --layer 2 \\
      --retention-ratio 0.1 --output kept.html
""",
    "recall": """\
examples:
  qts plot recall --model Qwen/Qwen2.5-VL-7B-Instruct --trials 8 --output recall.png
  qts plot recall film.mp4 --needle cat.jpg --at 95 --question "Which animal appears?" --model ./checkpoint \\
      --output recall.html
""",
}


def add_plot(commands: argparse._SubParsersAction) -> None:
    plot = commands.add_parser(
        "plot",
        help="draw relevance over frames, kept tokens over time, or which layer finds a needle",
        description="Draws what a model looks at, as a PNG or as one HTML file with the numbers in it.",
    )
    pictures = plot.add_subparsers(dest="picture", required=True, metavar="PICTURE")
    _add_heatmap(pictures)
    _add_timeline(pictures)
    _add_recall(pictures)


def _add_heatmap(pictures: argparse._SubParsersAction) -> None:
    heatmap = _add(pictures, "heatmap", "relevance of the video's tokens to a question, over the frames, a row a layer")
    options.add_video(heatmap)
    heatmap.add_argument("question", metavar="QUESTION", help="what to ask about it")
    options.add_model(heatmap)
    relevance = heatmap.add_argument_group("relevance")
    _add_layers(relevance, "four, spread over the depth")
    options.add_relevance(relevance)
    relevance.add_argument(
        "--frames", type=options.count, default=6, metavar="N", help="frames shown (default: %(default)s)"
    )
    _add_rest(heatmap)


def _add_timeline(pictures: argparse._SubParsersAction) -> None:
    timeline = _add(pictures, "timeline", "kept tokens a second of video, and relevance, a row a question and method")
    options.add_video(timeline)
    timeline.add_argument("questions", metavar="QUESTION", nargs="+", help="what to ask about it")
    options.add_model(timeline)
    selection = options.add_budget(timeline)
    selection.add_argument(
        "--method",
        type=_methods,
        default=["qtsplus"],
        metavar="NAME[,NAME...]",
        help=f"how tokens are chosen: {', '.join(SELECTING)} (default: qtsplus)",
    )
    options.add_methods(selection)
    _add_rest(timeline)


def _add_recall(pictures: argparse._SubParsersAction) -> None:
    recall = _add(pictures, "recall", "how much of a planted needle frame the relevance of each layer finds: Recall@K")
    options.add_video(recall, nargs="?")
    options.add_model(recall)
    needle = recall.add_argument_group("needle")
    needle.add_argument("--needle", metavar="IMAGE", help="picture to plant (default: a shape drawn for every trial)")
    needle.add_argument(
        "--at", type=options.seconds, metavar="SECONDS", help="when it shows (default: at random in every trial)"
    )
    needle.add_argument("--question", help="what only the needle answers (default: about the shape)")
    needle.add_argument("--trials", type=options.count, metavar="N", help="needles planted, one by one (default: 5)")
    needle.add_argument("--seed", type=int, default=0, metavar="N", help="of the needles and their times (default: 0)")
    relevance = recall.add_argument_group("relevance")
    _add_layers(relevance, "all")
    options.add_relevance(relevance)
    _add_rest(recall)


def _add(pictures: argparse._SubParsersAction, name: str, what: str) -> argparse.ArgumentParser:
    return pictures.add_parser(
        name,
        help=what,
        description=f"Draws {what}.",
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_layers(group: argparse._ArgumentGroup, default: str) -> None:
    group.add_argument(
        "--layers",
        type=layer_ranges,
        metavar="LAYERS",
        help=f"'all', numbers from 0 as in 0,4,8, or a range without its end as in 10:20 (default: {default})",
    )


def _add_rest(parser: argparse.ArgumentParser) -> None:
    options.add_reading(parser)
    options.add_vision_chunks(options.add_running(parser))
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output", required=True, metavar="FILE", help="FILE.png, or FILE.html for a page that holds the numbers too"
    )


SELECTING = tuple(name for name in options.METHODS if name != "none")


def _methods(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SELECTING:
            raise argparse.ArgumentTypeError(f"expected names of {', '.join(SELECTING)}, got {name!r}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected each name once, got {text}")
    return names
