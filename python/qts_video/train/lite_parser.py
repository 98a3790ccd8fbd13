"""The options of ``qts train flexselect-lite``. Needs nothing but the standard library."""

import argparse

from qts_video import options

EXAMPLES = """\
examples:
  qts train flexselect-lite data.jsonl --model lmms-lab/LLaVA-Video-7B-Qwen2 \\
      --language-model Qwen/Qwen2.5-0.5B-Instruct --output lite
  qts train flexselect-lite data.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct --output lite \\
      --teacher-scores scores --eval-data held-out.jsonl --report-to tensorboard
  torchrun --nproc-per-node 8 -m qts_video train flexselect-lite data.jsonl --model ... --output lite
  qts ask film.mp4 "Who enters last?" --model ... --method flexselect --lite lite

The data are questions about videos, as 'qts train qtsplus' reads them; answers are not used. The defaults are the
published recipe: 64 frames, learning rate 1e-5, one epoch, and a rank loss.
"""


def add_lite(commands: argparse._SubParsersAction) -> None:
    """Add ``flexselect-lite`` to the subcommands of ``qts train``."""
    lite = commands.add_parser(
        "flexselect-lite",
        help="train a small scorer to order video tokens as a layer of a big model does",
        description="Trains the small selector of FlexSelect-Lite on the attention of a big model, which stays as it "
        "is. Writes what '--lite' of 'qts ask' reads.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_data(lite)
    _add_teacher(lite)
    _add_student(lite)
    _add_training(lite)


def _add_data(lite: argparse.ArgumentParser) -> None:
    lite.add_argument("data", metavar="DATA", nargs="+", help="files of questions about videos")
    lite.add_argument("--output", required=True, metavar="FOLDER", help="where the selector and its checkpoints go")
    data = lite.add_argument_group("data")
    data.add_argument("--eval-data", metavar="FILE", nargs="+", help="questions for an evaluation behind every epoch")
    data.add_argument(
        "--media-root", metavar="FOLDER", help="where records' videos are (default: the folder of their file)"
    )
    data.add_argument("--fps", type=options.rate, default=2.0, help="sampled frames a second (default: %(default)s)")
    data.add_argument(
        "--max-frames",
        type=options.count,
        default=64,
        metavar="N",
        help="most sampled frames, spread over the whole video (default: %(default)s)",
    )
    data.add_argument(
        "--max-pixels",
        type=options.count,
        metavar="N",
        help="pixels a frame is shrunk to (default: 768 tokens of 28x28)",
    )
    data.add_argument(
        "--workers",
        type=options.index,
        default=0,
        metavar="N",
        help="processes that read videos (default: %(default)s)",
    )


def _add_teacher(lite: argparse.ArgumentParser) -> None:
    options.add_model(lite)
    teacher = lite.add_argument_group("teacher")
    teacher.add_argument(
        "--layer",
        type=options.index,
        metavar="N",
        help="the layer, counted from 0, whose attention is learnt (default: the published one of the model; 'qts plot "
        "recall' finds the best one of any)",
    )
    options.add_relevance(teacher)
    teacher.add_argument(
        "--teacher-scores",
        metavar="FOLDER",
        help="keep the teacher's scores there and read them in every epoch: missing ones are made before the training",
    )


def _add_student(lite: argparse.ArgumentParser) -> None:
    student = lite.add_argument_group("student")
    start = student.add_mutually_exclusive_group()
    start.add_argument(
        "--language-model",
        metavar="PATH",
        help="start from the weights of this Qwen2 language model, as the published selectors did, e.g. "
        "Qwen/Qwen2.5-0.5B-Instruct (a checkpoint folder or hub id; default: random weights)",
    )
    start.add_argument("--lite", metavar="PATH", help="train this selector further (a checkpoint folder or hub id)")
    student.add_argument(
        "--hidden-size",
        type=options.count,
        metavar="N",
        help="width, a multiple of 64; heads and feed-forward follow in the published proportions (default: 896)",
    )
    student.add_argument("--layers", type=options.count, metavar="N", help="layers (default: 24)")
    student.add_argument(
        "--loss",
        choices=("l1", "rank", "both"),
        default="rank",
        help="1 - Spearman's rank correlation, the distance of standardised log-scores, or their sum (default: "
        "%(default)s)",
    )


def _add_training(lite: argparse.ArgumentParser) -> None:
    training = options.add_running(lite)
    training.add_argument("--learning-rate", type=float, default=1e-5, metavar="R", help="default: %(default)s")
    training.add_argument("--epochs", type=float, default=1.0, metavar="N", help="default: %(default)s")
    training.add_argument("--max-steps", type=options.count, metavar="N", help="stop there (default: by the epochs)")
    training.add_argument(
        "--batch-size", type=options.count, default=1, metavar="N", help="samples a step and process (default: 1)"
    )
    training.add_argument(
        "--accumulate", type=options.count, default=1, metavar="N", help="batches a step (default: %(default)s)"
    )
    training.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time: layers run once more backwards"
    )
    training.add_argument(
        "--save-steps", type=options.count, default=500, metavar="N", help="steps a checkpoint (default: %(default)s)"
    )
    training.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    training.add_argument("--seed", type=options.index, default=0, metavar="N", help="default: %(default)s")
    training.add_argument(
        "--report-to", default="none", metavar="NAME", help="tensorboard, wandb, ... (default: %(default)s)"
    )
