"""Accuracy by method, share of tokens kept, kind of question and length of film, on films that no training saw."""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from qts_video.methods import FlexSelect, QTSplus, QuoTA, Random, Uniform
from qts_video.plot.recall import best_layer

from .evaluate import ALL_TOKENS, FRAMES_PER_SET, Outcome, accuracy, ask, films, recall_by_layer
from .questions import KINDS

RATIOS = (0.25, 0.1, 0.05)
SECONDS = (30, 60, 120)
RUNS = 3
_TRAINED = {
    "qtsplus": "QTSplus",
    "qtsplus-no-reencoder": "QTSplus without re-encoder",
    "qtsplus-no-time": "QTSplus without time",
}


def methods(folder: Path, layer: int, ratio: float) -> dict[str, Any]:
    """Every selector that can be had from ``folder``, at one ratio."""
    made = {
        "uniform": Uniform(retention_ratio=ratio),
        "random": Random(retention_ratio=ratio),
        "FlexSelect": FlexSelect(layer=layer, retention_ratio=ratio, frames_per_set=FRAMES_PER_SET),
        "QuoTA, relevance": QuoTA("relevance", total_tokens=None, retention_ratio=ratio),
    }
    for name, title in _TRAINED.items():
        if (folder / name).is_dir():
            made[title] = QTSplus.from_pretrained(folder / name, retention_ratio=ratio)
    if (folder / "lite").is_dir():
        made["FlexSelect-Lite"] = FlexSelect.lite(folder / "lite", retention_ratio=ratio, frames_per_set=FRAMES_PER_SET)
    return made


def report(
    model: Any, processor: Any, folder: Path, count: int, log: Callable[[str], None] = print, split: str = "test"
) -> dict[str, Any]:
    """All figures. ``count`` films of each length in each of ``RUNS`` runs, no film twice."""
    recalls = recall_by_layer(model, processor, films("validation", 0, count, (30, 30)))
    layer = best_layer(recalls)
    log(f"Recall@K by layer: { {one: round(float(np.mean(of)), 3) for one, of in recalls.items()} }")
    selectors: dict[str, Any] = {"all tokens": ALL_TOKENS}
    for ratio in RATIOS:
        selectors |= {f"{name}|{ratio}": one for name, one in methods(folder, layer, ratio).items()}
    lengths: dict[str, Any] = {"8-16": _runs(model, processor, {"all tokens": ALL_TOKENS}, 2 * count, (8, 16), split)}
    layers = {str(one): FlexSelect(layer=one, retention_ratio=0.1, frames_per_set=FRAMES_PER_SET) for one in recalls}
    by_layer = _runs(model, processor, layers, count, (30, 30), split)
    for seconds in SECONDS:
        lengths[str(seconds)] = _runs(model, processor, selectors, count, (seconds, seconds), split)
        log(f"{seconds} s: {json.dumps({k: v['all'] for k, v in lengths[str(seconds)].items()})}")
    return {
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "films_a_run": count,
        "runs": RUNS,
        "split": split,
        "flexselect_layer": layer,
        "recall_by_layer": {str(one): float(np.mean(of)) for one, of in recalls.items()},
        "accuracy_by_layer": {one: row["all"] for one, row in by_layer.items()},
        "accuracy": lengths,
    }


def _runs(
    model: Any, processor: Any, selectors: dict[str, Any], count: int, seconds: tuple[int, int], split: str
) -> dict[str, Any]:
    """Of each method: its figures over all films, and "runs", the mean over the kinds of each run."""
    runs: list[list[Outcome]] = [
        list(ask(model, processor, films(split, run * count, count, seconds), selectors)) for run in range(RUNS)
    ]
    pooled = accuracy([outcome for run in runs for outcome in run])
    by_run = [accuracy(run) for run in runs]
    return {name: figures | {"runs": [one[name]["all"] for one in by_run]} for name, figures in pooled.items()}


def to_json(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1) + "\n"


def markdown(found: dict[str, Any]) -> str:
    """The tables of ``report``'s figures."""
    short = found["accuracy"]["8-16"]["all tokens"]
    lines = [
        f"All tokens, films of 8 to 16 s: {_percent(short['all'])} of {short['questions']} answers "
        f"({', '.join(f'{kind} {_percent(short[kind])}' for kind in KINDS)}).",
        "",
        "Training-free FlexSelect by layer, films of 30 s: Recall@K on validation films, by which the layer is chosen, "
        "and answers with 10 % of the tokens on test films.",
        "",
        "| layer | Recall@K | right |",
        "|---|---|---|",
    ]
    for layer, value in found["recall_by_layer"].items():
        mark = " (chosen)" if int(layer) == found["flexselect_layer"] else ""
        lines.append(f"| {layer}{mark} | {_percent(value)} | {_percent(found['accuracy_by_layer'][layer])} |")
    for seconds in map(str, SECONDS):
        table = found["accuracy"][seconds]
        questions = table["all tokens"]["questions"]
        lines += ["", f"### Films of {seconds} s ({questions} questions)", ""]
        lines += [
            "| method | kept | all | least and most of the runs | " + " | ".join(KINDS) + " | needle kept |",
            "|---|---|---|---|" + "---|" * (len(KINDS) + 1),
        ]
        for name, row in table.items():
            method, _, ratio = name.partition("|")
            cells = [_percent(row[kind]) for kind in KINDS] + [_percent(row["found"])]
            spread = f"{_percent(min(row['runs']))} to {_percent(max(row['runs']))}"
            kept = f"{float(ratio):.0%}" if ratio else "100%"
            lines.append(f"| {method} | {kept} | **{_percent(row['all'])}** | {spread} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(found: dict[str, Any]) -> str:
    """The means over the kinds alone, in one table."""
    accuracy, ratios = found["accuracy"], [f"{ratio:g}" for ratio in RATIOS]
    heads = [f"{seconds} s, {float(ratio):.0%}" for seconds in SECONDS for ratio in ratios]
    lines = [f"| right answers, % | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    full = [_percent(accuracy[str(seconds)]["all tokens"]["all"]) for seconds in SECONDS for _ in ratios]
    lines.append(f"| all tokens | {' | '.join(full)} |")
    names = dict.fromkeys(name.partition("|")[0] for name in accuracy[str(SECONDS[0])] if "|" in name)
    for name in names:
        row = [_percent(accuracy[str(seconds)][f"{name}|{ratio}"]["all"]) for seconds in SECONDS for ratio in ratios]
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
