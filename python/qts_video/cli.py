"""The command ``qts``. Heavy imports wait until a subcommand needs them."""

import argparse
import os
import sys

from qts_kernels import __version__

METHODS = ("qtsplus", "uniform", "random", "none")

ASK_EXAMPLES = """\
examples:
  qts ask film.mp4 "When does it rain?" --model AlpachinoNLP/QTSplus-3B --save-overlay kept.png
  qts ask film.mp4 "What does she open first?" --model Qwen/Qwen2.5-VL-3B-Instruct \\
      --method uniform --retention-ratio 0.1
  qts ask frames/ "How many people?" --model ./checkpoint --method none --json > answer.json

The answer goes to stdout, everything else to stderr. Exit status 2: the video, the model or an option cannot be used.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qts",
        description="Query-aware vision-token selection for video language models: answers from a tenth of the tokens.",
        epilog="Start with: qts demo",
    )
    parser.add_argument("--version", action="version", version=f"qts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="see selection at work on a film made on the spot; needs no network and no checkpoint",
        description="Makes a short film, asks a small Qwen2.5-VL with random weights about it with and without "
        "selection, prints what that took and draws what was kept.",
    )
    demo.add_argument(
        "--output",
        default="demo-output",
        metavar="FOLDER",
        help="where the film and the picture go (default: %(default)s)",
    )
    demo.add_argument(
        "--retention-ratio",
        type=_ratio,
        default=0.1,
        metavar="R",
        help="share of the video tokens to keep (default: %(default)s)",
    )

    ask = commands.add_parser(
        "ask",
        help="ask a question about a video",
        description="Asks a Qwen2.5-VL a question about a video, with or without token selection.",
        epilog=ASK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ask.add_argument("video", metavar="VIDEO", help="video file, or a folder of images")
    ask.add_argument("question", metavar="QUESTION", help="what to ask about it")
    ask.add_argument(
        "--model",
        required=True,
        metavar="PATH_OR_HUB_ID",
        help="a Qwen2.5-VL checkpoint, or a whole QTSplus checkpoint",
    )

    selection = ask.add_argument_group("selection")
    selection.add_argument(
        "--method", choices=METHODS, default="qtsplus", help="how tokens are chosen (default: %(default)s)"
    )
    budget = selection.add_mutually_exclusive_group()
    budget.add_argument(
        "--retention-ratio", type=_ratio, metavar="R", help="share of the video tokens to keep, in (0, 1]"
    )
    budget.add_argument("--max-tokens", type=_count, metavar="N", help="most video tokens to keep")
    selection.add_argument(
        "--selector",
        metavar="PATH",
        help="QTSplus selector: a checkpoint folder or hub id, or 'language-model' for an untrained one made from the "
        "model's own layers (default: the one in --model)",
    )
    selection.add_argument(
        "--positions",
        choices=("original", "compact"),
        help="kept tokens keep their places in time and space, or close ranks (default: compact with the selector of "
        "a whole QTSplus checkpoint, which was trained so; else original)",
    )

    reading = ask.add_argument_group("reading the video")
    reading.add_argument(
        "--fps", type=_rate, default=2.0, help="sampled frames a second, by time stamps (default: %(default)s)"
    )
    reading.add_argument(
        "--max-frames",
        type=_count,
        default=768,
        metavar="N",
        help="most sampled frames, spread over the whole video (default: %(default)s)",
    )
    reading.add_argument(
        "--max-pixels", type=_count, metavar="N", help="pixels a frame is shrunk to (default: 768 tokens of 28x28)"
    )
    reading.add_argument(
        "--frame-rate", type=_rate, metavar="FPS", help="rate at which a folder's images were taken (default: --fps)"
    )
    reading.add_argument(
        "--reader", choices=("auto", "pyav", "qwen-vl-utils"), default="auto", help="default: PyAV, else qwen-vl-utils"
    )

    running = ask.add_argument_group("running")
    running.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    running.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="default: bfloat16 on a GPU, float32 on a CPU",
    )
    running.add_argument(
        "--max-new-tokens", type=_count, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )

    output = ask.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="one JSON object on stdout: answer, counts, timings, and each kept token's frame, row, column and seconds",
    )
    output.add_argument(
        "--save-overlay", metavar="FILE", help="PNG of the kept tokens over the frames, and of relevance over time"
    )

    commands.add_parser(
        "doctor",
        help="what is installed, which implementation serves each op and why, and what is missing",
        description="Says what is installed, which implementation serves each op and why, and how to get the rest.",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "doctor":
        from . import doctor

        return doctor.run()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return 130


def _run(arguments: argparse.Namespace) -> int:
    from .video import VideoError

    _quiet()
    try:
        if arguments.command == "demo":
            from . import demo

            return demo.run(arguments)
        from . import ask

        try:
            return ask.run(arguments)
        except ask.AskError as error:
            return _fail(str(error))
    except VideoError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("qts_"):
            raise
        return _fail(f"{error.name} is not installed: pip install 'qts_kernels[video]'")


def _fail(message: str) -> int:
    print(f"qts: {message}", file=sys.stderr)
    return 2


def _quiet() -> None:
    """Keep the libraries' retries and advice off the screen: what goes wrong is told in one line of our own."""
    settings = {"HF_HUB_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
    if not sys.stderr.isatty():
        settings["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in (0, 1], got {text}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected frames a second above 0, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
