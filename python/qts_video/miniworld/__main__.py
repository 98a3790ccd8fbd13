"""``python -m qts_video.miniworld``: train the model and its selectors, report how they do, write a film."""

import argparse
from pathlib import Path

import torch

BEGIN, END = "<!-- written by make miniworld-report -->", "<!-- end of what make miniworld-report writes -->"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qts_video.miniworld", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="from scratch, from one seed")
    train.add_argument("--output", type=Path, required=True)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train.add_argument("--processes", type=int, help="default: 2 on a CPU, 1 on a GPU")
    report = commands.add_parser("report", help="accuracy by method and share of tokens kept")
    report.add_argument("--model", type=Path, required=True, help="folder that train wrote")
    report.add_argument("--films", type=int, default=15, help="of each length, in each of three runs")
    report.add_argument("--processes", type=int, default=2)
    report.add_argument("--json", type=Path, required=True)
    report.add_argument(
        "--markdown", type=Path, required=True, help="page whose part between its marks is written anew"
    )
    report.add_argument("--summary", type=Path, help="another one, with the means alone")
    publish = commands.add_parser("publish", help="make what was trained the embedded model")
    publish.add_argument("--model", type=Path, required=True, help="folder that train wrote")
    publish.add_argument("--json", type=Path, required=True, help="that report wrote, for the model card")
    publish.add_argument("--seed", type=int, default=0, help="that it was trained from (default: %(default)s)")
    film = commands.add_parser("film", help="an mp4, and the questions about it")
    film.add_argument("path", type=Path)
    film.add_argument("--number", type=int, default=0)
    film.add_argument("--seconds", type=int, default=30)
    arguments = parser.parse_args()
    {"train": _train, "report": _report, "publish": _publish, "film": _film}[arguments.command](arguments)


def _train(arguments: argparse.Namespace) -> None:
    from .train import Recipe, train

    processes = arguments.processes or (2 if arguments.device == "cpu" else 1)
    train(arguments.output, Recipe(seed=arguments.seed, processes=processes, device=arguments.device))


def _report(arguments: argparse.Namespace) -> None:
    from .report import markdown, report, summary, to_json

    found = report(arguments.model, arguments.films, arguments.processes)
    arguments.json.write_text(to_json(found))
    _write(arguments.markdown, markdown(found))
    if arguments.summary is not None:
        _write(arguments.summary, summary(found))


def _write(path: Path, text: str) -> None:
    """Put ``text`` between the two marks of a page."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"{path} must have {BEGIN!r} and behind it {END!r}")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}")


def _publish(arguments: argparse.Namespace) -> None:
    from .publish import publish

    publish(arguments.model, arguments.json, arguments.seed)


def _film(arguments: argparse.Namespace) -> None:
    from .film import write_film
    from .questions import all_questions
    from .world import sample_scene

    scene = sample_scene("test", arguments.number, arguments.seconds)
    print(write_film(arguments.path, scene))
    for questions in all_questions(scene).values():
        for question in questions:
            print(f"{question.text}  {question.answer}")


if __name__ == "__main__":
    main()
