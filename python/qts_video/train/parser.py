"""The command line of ``qts train``. Needs nothing but the standard library."""

import argparse

from qts_video import options
from qts_video.train.lite_parser import add_lite

EXAMPLES = """\
examples:
  qts train qtsplus questions.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct --output stage1 --tau-s 0.002
  torchrun --nproc-per-node 4 -m qts_video train qtsplus questions.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct \\
      --selector stage1 --stage 2 --lora-rank 16 --output stage2
  qts train qtsplus questions.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct --output stage1 --tau-s 0.002 --resume

The output folder is the selector: qts ask ... --selector stage1
Exit status 2: data, model or an option cannot be used.
"""


def add_train(commands: argparse._SubParsersAction) -> None:
    train = commands.add_parser(
        "train",
        help="train a selector for a video model",
        description="Trains what selects tokens, on questions about videos with their answers.",
    )
    trained = train.add_subparsers(dest="trained", required=True, metavar="WHAT")
    _add_qtsplus(trained)
    add_lite(trained)


def _add_qtsplus(trained: argparse._SubParsersAction) -> None:
    parser = trained.add_parser(
        "qtsplus",
        help="a QTSplus selector, inside the model that it selects for",
        description="Trains a QTSplus selector by the answers of the model that it selects for (stage 1), or the "
        "language model with it (stage 2). Defaults are the published recipe's.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data(parser)
    options.add_model(parser)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the selector and the checkpoints go")
    _add_selector(parser)
    _add_recipe(parser)
    _add_running(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", metavar="DATA.jsonl", help="questions about videos with their answers")
    data = parser.add_argument_group("data")
    data.add_argument("--media-root", metavar="FOLDER", help="where the videos are (default: beside each file)")
    data.add_argument("--eval-data", nargs="+", metavar="DATA.jsonl", help="questions to evaluate on")
    data.add_argument("--skip-bad", action="store_true", help="leave bad records out in place of stopping at them")
    data.add_argument("--fps", type=options.rate, default=2.0, help="sampled frames a second (default: %(default)s)")
    data.add_argument(
        "--max-frames", type=options.count, default=40, metavar="N", help="most frames a video (default: %(default)s)"
    )
    data.add_argument("--max-pixels", type=options.count, metavar="N", help="pixels a frame is shrunk to")
    data.add_argument(
        "--frame-rate", type=options.rate, metavar="FPS", help="rate at which a folder's images were taken"
    )
    data.add_argument(
        "--sampling",
        choices=("uniform", "middle", "random"),
        default="uniform",
        help="which moments are sampled; random ones differ between epochs (default: %(default)s)",
    )
    data.add_argument(
        "--max-length", type=options.count, metavar="N", help="most tokens of a sample; a longer one is an error"
    )


def _add_selector(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("selector")
    group.add_argument(
        "--selector",
        metavar="PATH",
        help="a selector to go on with (default: the one in --model, else a new one from its layers)",
    )
    group.add_argument("--scoring-layers", type=options.count, metavar="N", help="of a new selector (default: 1)")
    group.add_argument("--reencode-layers", type=options.index, metavar="N", help="of a new selector (default: 1)")
    group.add_argument(
        "--tau-s",
        type=options.rate,
        metavar="TAU",
        help="temperature of the gate, in units of the scores, whose mean is about 1/M: 0.002 tells 1,000 tokens apart "
        "(default: the selector's; 0.5 for a new one)",
    )
    group.add_argument(
        "--n-max",
        type=options.count,
        metavar="N",
        help="most tokens kept of a video, and the unit of the budget losses (default: the selector's; 512 for a new "
        "one)",
    )
    group.add_argument("--no-gate-noise", action="store_true", help="keep the best of the budget; draw nothing")
    group.add_argument(
        "--positions",
        choices=("original", "compact"),
        help="kept tokens keep their places in time and space, or close ranks (default: compact with the selector of "
        "a whole QTSplus checkpoint, which was trained so; else original)",
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument(
        "--stage", type=int, choices=(1, 2), default=1, help="1: the selector; 2: the language model too (default: 1)"
    )
    recipe.add_argument(
        "--lora-rank", type=options.index, default=0, metavar="N", help="stage 2: LoRA of this rank (default: no LoRA)"
    )
    recipe.add_argument("--learning-rate", type=options.rate, default=1e-6, help="default: %(default)s, cosine")
    recipe.add_argument(
        "--warmup", type=_share, default=0.01, metavar="SHARE", help="of the steps that warm up (default: %(default)s)"
    )
    length = recipe.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=options.rate, default=8.0, metavar="N", help="default: 8")
    length.add_argument("--max-steps", type=options.count, metavar="N", help="steps, in place of epochs")
    recipe.add_argument(
        "--batch-size", type=options.count, default=1, metavar="N", help="samples a device (default: %(default)s)"
    )
    recipe.add_argument(
        "--gradient-accumulation", type=options.count, default=1, metavar="N", help="batches a step (default: 1)"
    )
    for name, default, what in (
        ("squared", 0.1, "(rho M / n_max)^2"),
        ("linear", 0.17, "rho M / n_max"),
        ("stability", 0.05, "(rho - running mean)^2"),
    ):
        recipe.add_argument(
            f"--lambda-{name}",
            type=options.seconds,
            default=default,
            metavar="WEIGHT",
            help=f"of {what} (default: %(default)s)",
        )
    recipe.add_argument("--seed", type=int, default=0, metavar="N", help="of order and noise (default: 0)")


def _add_running(parser: argparse.ArgumentParser) -> None:
    running = parser.add_argument_group("running")
    running.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="CHECKPOINT",
        help="go on from a checkpoint of the same training (default: the last one in --output)",
    )
    running.add_argument("--cpu", action="store_true", help="use no GPU")
    running.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what is computed in; what is trained stays float32 (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    running.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    running.add_argument("--workers", type=options.index, default=0, metavar="N", help="processes that read videos")
    running.add_argument("--logging-steps", type=options.count, default=10, metavar="N", help="default: %(default)s")
    running.add_argument(
        "--save-steps", type=options.count, default=500, metavar="N", help="between checkpoints (default: %(default)s)"
    )
    running.add_argument(
        "--eval-steps",
        type=options.count,
        metavar="N",
        help="between evaluations (default: every epoch)",
    )
    running.add_argument(
        "--predictions", type=options.index, default=0, metavar="N", help="answers shown at every evaluation"
    )
    running.add_argument(
        "--report-to", nargs="+", default=["none"], metavar="NAME", help="tensorboard, wandb, ... (default: none)"
    )


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1), got {text}")
    return value
