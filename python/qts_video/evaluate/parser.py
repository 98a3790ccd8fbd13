"""The command line of ``qts eval``. Needs nothing but the standard library."""

import argparse

from qts_video import options

EXAMPLES = """\
examples:
  qts eval test.jsonl --model AlpachinoNLP/QTSplus-3B --output results/qtsplus
  qts eval test.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --method flexselect --layer 20 --max-tokens 7040 \\
      --media-root videos/ --output results/flexselect

Writes predictions.jsonl, metrics.json and, of multiple choice, confusion.png and curves.png. The same command goes on
where it was stopped.
Exit status 1: records were left out (metrics.json lists them). 2: the file, the model or an option can't be used.
"""


def add_eval(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="how well a model answers a file of questions, with and without selection",
        description="Asks a model every question of a file about videos, and compares its answers with those of the "
        "file: accuracy, precision, recall, F1 and areas under curves of multiple choice, exact match and token F1 of "
        "free answers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("file", metavar="FILE", help="JSON Lines of questions: docs/data.md")
    options.add_model(evaluate)
    options.add_data(evaluate)
    selection = options.add_budget(evaluate)
    selection.add_argument(
        "--method", choices=options.METHODS, default="qtsplus", help="how tokens are chosen (default: %(default)s)"
    )
    options.add_methods(selection)
    options.add_reading(evaluate, max_frames=64)
    running = options.add_running(evaluate)
    options.add_vision_chunks(running)
    running.add_argument(
        "--batch-size", type=options.count, default=1, metavar="N", help="questions at a time (default: %(default)s)"
    )
    running.add_argument(
        "--max-new-tokens",
        type=options.count,
        metavar="N",
        help="longest answer (default: 16 of multiple choice, 64 else)",
    )
    running.add_argument(
        "--score",
        choices=("generate", "logits"),
        help="multiple choice: the predicted letter is the one that the greedy answer names, or the likeliest first "
        "token among the letters (default: generate)",
    )
    running.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --method random and of torch (default: %(default)s)"
    )
    evaluate.add_argument("--output", default="eval-output", metavar="FOLDER", help="default: %(default)s")
