"""``qts eval``: every question of a file, the answers, and how good they are."""

import argparse
import contextlib
import hashlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qts_video.answer import default_positions
from qts_video.cache import VideoCache
from qts_video.data import RecordError, Sample, VideoQADataset
from qts_video.evaluate.classification import classify
from qts_video.evaluate.letters import parse_letter
from qts_video.evaluate.predict import Prediction, Predictor
from qts_video.evaluate.results import Results
from qts_video.evaluate.text import exact_match, token_f1
from qts_video.loading import FRAME_PIXELS, VIDEO_PIXELS, CommandError, check_methods, choose, first_line, load
from qts_video.video import VideoError

MAX_NEW_TOKENS = {True: 16, False: 64}
"""By whether there are choices."""

# What the answers do not depend on, but for rounding.
_NOT_SETTINGS = {"command", "output", "file", "media_root", "device", "vision_chunk_frames"}


def run(arguments: argparse.Namespace) -> int:
    """The metrics on stdout, everything else on stderr. 1 where records were left out."""
    with contextlib.redirect_stdout(sys.stderr):
        check_methods(arguments, [arguments.method])
        if arguments.dynamic_frames:
            raise CommandError("--dynamic-frames is for one video: say --max-frames here")
        import matplotlib  # noqa: F401  (if it is missing, say so before the work and not after)

        dataset = _dataset(arguments)
        choice = bool(dataset.records[0].choices)
        if arguments.score is not None and not choice:
            raise CommandError("--score belongs to questions with choices, and this file has none")
        arguments.score = arguments.score or "generate"
        arguments.max_new_tokens = arguments.max_new_tokens or MAX_NEW_TOKENS[choice]
        if choice and arguments.score == "logits":
            arguments.max_new_tokens = 1
        try:
            results = Results(arguments.output, _settings(arguments))
        except ValueError as error:
            raise CommandError(str(error)) from error
        skipped = [{"source": bad.source, "reason": bad.reason} for bad in dataset.bad]
        skipped += [{"source": r.source, "reason": f"no video {r.media}"} for r in dataset.missing]
        if any(record.number not in results.done for record in dataset.records):
            skipped += _predict(arguments, dataset, results)
        lines = results.ordered()
        if not lines:
            raise CommandError(f"no question could be asked; the first: {skipped[0]['source']}: {skipped[0]['reason']}")
        metrics = _metrics(lines, choice)
        path = results.write_metrics({**metrics, "skipped": skipped})
        pictures = _draw(arguments, results, metrics, lines) if choice else []
    print(_summary(metrics, skipped, [path, *pictures]))
    return 1 if skipped else 0


def _dataset(arguments: argparse.Namespace) -> VideoQADataset:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset = VideoQADataset(
                arguments.file,
                media_root=arguments.media_root,
                format=arguments.format,
                on_bad="skip",
                sampling=arguments.sampling,
                seed=arguments.seed,
                fps=arguments.fps,
                max_frames=arguments.max_frames,
                max_pixels=arguments.max_pixels or FRAME_PIXELS,
                total_pixels=VIDEO_PIXELS,
                frame_rate=arguments.frame_rate,
                reader=arguments.reader,
            )
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
    for warning in caught:
        print(warning.message, file=sys.stderr)
    if len({bool(record.choices) for record in dataset.records}) > 1:
        raise RecordError("expected questions with choices or questions without, got both")
    return dataset


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the answers depend on: the options, and what the file holds."""
    options = {name: value for name, value in vars(arguments).items() if name not in _NOT_SETTINGS}
    return options | {"file": hashlib.blake2b(Path(arguments.file).read_bytes(), digest_size=16).hexdigest()}


def _predict(arguments: argparse.Namespace, dataset: VideoQADataset, results: Results) -> list[dict[str, str]]:
    """Ask what is not answered yet; what could not be asked, and why."""
    torch.manual_seed(arguments.seed)
    model, processor, trained = load(arguments)
    selector = choose(arguments, arguments.method, model, processor, trained)
    if arguments.method == "random":
        selector.seed = arguments.seed
    predictor = Predictor(
        model,
        processor,
        selector,
        positions=arguments.positions or default_positions(model, selector, trained),
        max_new_tokens=arguments.max_new_tokens,
        cache=VideoCache() if arguments.batch_size == 1 else None,
        vision_chunk_frames=arguments.vision_chunk_frames,
    )
    skipped: list[dict[str, str]] = []
    todo = [index for index, record in enumerate(dataset.records) if record.number not in results.done]
    with tqdm(total=len(dataset), initial=len(results.done), desc="questions", disable=None) as bar:
        for batch in _batches(dataset, todo, arguments.batch_size, skipped):
            try:
                predictions = predictor([sample for _, sample in batch])
            except VideoError as error:
                skipped += [{"source": sample.source, "reason": str(error)} for _, sample in batch]
                continue
            except (ValueError, TypeError) as error:
                raise CommandError(f"{batch[0][1].name}: {first_line(error)}") from error
            for (index, sample), prediction in zip(batch, predictions, strict=True):
                results.add(_line(dataset.records[index].number, sample, prediction, arguments.score))
            bar.update(len(batch))
    return skipped


def _batches(
    dataset: VideoQADataset, todo: list[int], size: int, skipped: list[dict[str, str]]
) -> Iterator[list[tuple[int, Sample]]]:
    """Neighbouring samples with as many frames each, ``size`` at most. What does not decode is ``skipped``."""
    batch: list[tuple[int, Sample]] = []
    for index in todo:
        try:
            sample = dataset[index]
        except VideoError as error:
            skipped.append({"source": dataset.records[index].source, "reason": str(error)})
            continue
        if batch and (len(batch) == size or len(batch[0][1].video.frames) != len(sample.video.frames)):
            yield batch
            batch = []
        batch.append((index, sample))
    if batch:
        yield batch


def _line(number: int, sample: Sample, prediction: Prediction, score: str) -> dict[str, Any]:
    """What predictions.jsonl holds of a sample."""
    line = {
        "number": number,
        "source": sample.source,
        "id": sample.id,
        "video": sample.video.source,
        "question": sample.question,
        "answer": sample.answer,
        "text": prediction.text,
        "tokens": prediction.tokens,
        "kept": prediction.kept,
    }
    if not sample.choices:
        scores = {"exact_match": exact_match(prediction.text, sample.answer)}
        return line | scores | {"f1": token_f1(prediction.text, sample.answer)}
    letters = [chr(ord("A") + place) for place in range(len(sample.choices))]
    by_letter = dict(zip(letters, prediction.probabilities, strict=True))
    named = max(by_letter, key=by_letter.get) if score == "logits" else parse_letter(prediction.text, sample.choices)
    return line | {"choices": list(sample.choices), "prediction": named, "probabilities": by_letter}


def _metrics(lines: list[dict[str, Any]], choice: bool) -> dict[str, Any]:
    common = {
        "questions": len(lines),
        "tokens": sum(line["tokens"] for line in lines),
        "kept": sum(line["kept"] for line in lines),
    }
    common["retention_ratio"] = common["kept"] / common["tokens"]
    if choice:
        return common | classify(*_for_classify(lines))
    return common | {name: sum(line[name] for line in lines) / len(lines) for name in ("exact_match", "f1")}


def _for_classify(lines: list[dict[str, Any]]) -> tuple[list[str], list[str | None], list[list[float]]]:
    probabilities = [list(line["probabilities"].values()) for line in lines]
    return [line["answer"] for line in lines], [line["prediction"] for line in lines], probabilities


def _draw(
    arguments: argparse.Namespace, results: Results, metrics: dict[str, Any], lines: list[dict[str, Any]]
) -> list[Path]:
    from qts_video.evaluate.plots import confusion_page, curves_page
    from qts_video.plot.page import write

    truths, _, probabilities = _for_classify(lines)
    text = {
        "title": f"{arguments.method}: {100 * metrics['accuracy']:.1f} % of {len(lines):,} questions right",
        "subtitle": f"{arguments.model}, {Path(arguments.file).name}, {metrics['kept']:,} of {metrics['tokens']:,} "
        f"video tokens kept ({metrics['retention_ratio']:.1%})",
    }
    return [
        write(results.folder / "confusion.png", confusion_page(metrics, **text)),
        write(results.folder / "curves.png", curves_page(metrics, truths, probabilities, **text)),
    ]


def _summary(metrics: dict[str, Any], skipped: list[dict[str, str]], written: list[Path]) -> str:
    names = ("questions", "accuracy", "chance", "precision", "recall", "f1", "roc_auc", "pr_auc", "unparsed")
    names = (*names, "exact_match", "retention_ratio")
    lines = [f"{name:15} {_shown(metrics[name])}" for name in names if name in metrics]
    lines += [f"{'skipped':15} {len(skipped)}", *(f"  {one['source']}: {one['reason']}" for one in skipped)]
    return "\n".join([*lines, *(f"written         {path}" for path in written)])


def _shown(value: float | None) -> str:
    if value is None:
        return "unknown (a letter is right always or never)"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
