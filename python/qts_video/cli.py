"""The command ``qts``. Heavy imports wait until a subcommand needs them."""

import argparse
import os
import sys
import warnings
from importlib import import_module
from types import ModuleType

from qts_kernels import __version__

from . import options
from .evaluate.parser import add_eval
from .plot.parser import add_plot
from .split_parser import add_split
from .train.parser import add_train

ASK_EXAMPLES = """\
examples:
  qts ask film.mp4 "When does it rain?" --model AlpachinoNLP/QTSplus-3B --save-overlay kept.png
  qts ask film.mp4 "What does she open first?" "Who enters last?" --model Qwen/Qwen2.5-VL-7B-Instruct \\
      --method flexselect --layer 20 --max-tokens 7040
  qts ask frames/ "How many people?" --model ./checkpoint --method none --json > answer.json

Several questions share the work on the video. The answers go to stdout, everything else to stderr.
Exit status 2: the video, the model or an option cannot be used.
"""


_MODULES = {
    "ask": "ask",
    "plot": "plot.command",
    "eval": "evaluate.command",
    "train": "train.command",
    "data": "data.check",
    "split": "split",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qts",
        description="Query-aware vision-token selection for video language models: answers from a tenth of the tokens.",
        epilog="Start with: qts demo",
    )
    parser.add_argument("--version", action="version", version=f"qts {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_ask(commands)
    add_plot(commands)
    add_eval(commands)
    add_train(commands)
    _add_data(commands)
    add_split(commands)
    commands.add_parser(
        "doctor",
        help="what is installed, which implementation serves each op and why, and what is missing",
        description="Says what is installed, which implementation serves each op and why, and how to get the rest.",
    )
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo",
        help="see selection at work on a film made on the spot; needs no network and no checkpoint",
        description="Makes a short film, asks a small Qwen2.5-VL that was trained on such films about it with and "
        "without selection, prints the answers, what they took, and draws what was kept.",
    )
    demo.add_argument(
        "--output",
        default="demo-output",
        metavar="FOLDER",
        help="where the film and the picture go (default: %(default)s)",
    )
    demo.add_argument(
        "--retention-ratio",
        type=options.ratio,
        default=0.1,
        metavar="R",
        help="share of the video tokens to keep (default: %(default)s)",
    )


def _add_ask(commands: argparse._SubParsersAction) -> None:
    ask = commands.add_parser(
        "ask",
        help="ask questions about a video",
        description="Asks a video language model about a video, with or without token selection.",
        epilog=ASK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_video(ask)
    ask.add_argument("questions", metavar="QUESTION", nargs="+", help="what to ask about it")
    options.add_model(ask)
    selection = options.add_budget(ask)
    selection.add_argument(
        "--method", choices=options.METHODS, default="qtsplus", help="how tokens are chosen (default: %(default)s)"
    )
    options.add_methods(selection)
    options.add_reading(ask)
    running = options.add_running(ask)
    options.add_vision_chunks(running)
    running.add_argument(
        "--max-new-tokens", type=options.count, default=128, metavar="N", help="longest answer (default: %(default)s)"
    )
    output = ask.add_argument_group("output")
    output.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line and question on stdout: answer, counts, timings, and each kept token's frame, "
        "row, column and seconds",
    )
    output.add_argument(
        "--save-overlay", metavar="FILE", help="PNG of the kept tokens over the frames, and of relevance over time"
    )


def _add_data(commands: argparse._SubParsersAction) -> None:
    data = commands.add_parser(
        "data", help="look at a file of questions about videos", description="Looks at files of questions about videos."
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="what is in a file, and what is wrong with it",
        description="Counts the questions of a file and their answers, and lists its bad records, its repeated ids and "
        "the videos that are missing. Exit status 1: a record is bad, or a video is missing or does not decode.",
    )
    check.add_argument("file", metavar="FILE", help="JSON Lines of questions: docs/data.md")
    options.add_records(check)
    check.add_argument("--decode", action="store_true", help="open every video too")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    if arguments.command == "doctor":
        from . import doctor

        return doctor.run()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"qts: {message}", file=sys.stderr)
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
        from .loading import CommandError

        try:
            return _command(arguments.command).run(arguments)
        except CommandError as error:
            return _fail(str(error))
    except VideoError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("qts_"):
            raise
        return _fail(f"{error.name} is not installed: pip install 'qts_kernels[video]'")


def _command(name: str) -> ModuleType:
    """The module that runs a command, and what only that needs."""
    return import_module(f"qts_video.{_MODULES[name]}")


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


if __name__ == "__main__":
    sys.exit(main())
