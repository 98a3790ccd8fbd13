"""Accuracy by method, share of tokens kept, kind of question and length of film, on films that no training saw."""

import json
import platform
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import AutoProcessor

from qts_video.methods import FlexSelect, QTSplus, QuoTA, Random, Uniform
from qts_video.plot.probe import number_of_layers

from .evaluate import ALL_TOKENS, FRAMES_PER_SET, Outcome, accuracy, ask, films, reference_layer
from .model import load_model
from .questions import KINDS

RATIOS = (0.25, 0.1, 0.05)
SECONDS = (30, 60, 120)
RUNS = 3
_TRAINED = {
    "qtsplus": "QTSplus",
    "qtsplus-no-reencoder": "QTSplus without re-encoder",
    "qtsplus-no-time": "QTSplus without time",
}
_COMPACT = {"qtsplus-compact": "QTSplus", "qtsplus-compact-no-time": "QTSplus without time"}


def load(folder: Path) -> tuple[Any, Any]:
    """The model of ``folder``, float32 in eval mode, and its processor."""
    return load_model(folder / "model"), AutoProcessor.from_pretrained(folder / "model")


def report(
    folder: Path, count: int, processes: int = 1, log: Callable[[str], None] = print, split: str = "test"
) -> dict[str, Any]:
    """All figures of what ``train`` wrote. ``count`` films of each length in each of ``RUNS`` runs, no film twice."""
    layer, recalls = reference_layer(*load(folder))
    log(f"Recall@K by layer: { {one: round(float(np.mean(of)), 3) for one, of in recalls.items()} }")
    parts = {"layers": ("layers", (30, 30)), "compact": ("compact", (30, 30)), "8-16": ("all tokens", (8, 16))}
    parts |= {str(seconds): ("methods", (seconds, seconds)) for seconds in SECONDS}
    tasks = [
        (folder, layer, kind, seconds, split, run * count, count)
        for kind, seconds in parts.values()
        for run in range(RUNS)
    ]
    with ExitStack() as stack:
        run_all = map
        if processes > 1:
            spawn = torch.multiprocessing.get_context("spawn")
            run_all = stack.enter_context(ProcessPoolExecutor(processes, mp_context=spawn)).map
        runs = list(tqdm(run_all(_one_run, tasks), total=len(tasks), desc="runs", disable=None))
    figures = {name: _figures(runs[RUNS * n : RUNS * (n + 1)]) for n, name in enumerate(parts)}
    by_layer, compact = figures.pop("layers"), figures.pop("compact")
    return {
        "machine": f"{_processor()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "films_a_run": count,
        "runs": RUNS,
        "split": split,
        "flexselect_layer": layer,
        "recall_by_layer": {str(one): float(np.mean(of)) for one, of in recalls.items()},
        "accuracy_by_layer": {one: row["all"] for one, row in by_layer.items()},
        "accuracy_at_compact_positions": compact,
        "accuracy": figures,
    }


def _one_run(task: tuple[Path, int, str, tuple[int, int], str, int, int]) -> list[Outcome]:
    folder, layer, kind, seconds, split, first, count = task
    torch.set_num_threads(1)
    model, processor = load(folder)
    positions = "compact" if kind == "compact" else "original"
    selectors = _selectors(folder, layer, kind, model)
    return list(ask(model, processor, films(split, first, count, seconds), selectors, positions=positions))


def _selectors(folder: Path, layer: int, kind: str, model: Any) -> dict[str, Any]:
    if kind == "layers":
        every = range(number_of_layers(model))
        return {str(one): FlexSelect(layer=one, retention_ratio=0.1, frames_per_set=FRAMES_PER_SET) for one in every}
    if kind == "compact":
        return {
            f"{title}|0.1": QTSplus.from_pretrained(folder / name, retention_ratio=0.1)
            for name, title in _COMPACT.items()
        }
    selectors: dict[str, Any] = {"all tokens": ALL_TOKENS}
    if kind == "methods":
        for ratio in RATIOS:
            selectors |= {f"{name}|{ratio}": one for name, one in _methods(folder, layer, ratio).items()}
    return selectors


def _methods(folder: Path, layer: int, ratio: float) -> dict[str, Any]:
    trained = {title: QTSplus.from_pretrained(folder / name, retention_ratio=ratio) for name, title in _TRAINED.items()}
    return {
        "uniform": Uniform(retention_ratio=ratio),
        "random": Random(retention_ratio=ratio),
        **trained,
        "FlexSelect": FlexSelect(layer=layer, retention_ratio=ratio, frames_per_set=FRAMES_PER_SET),
        "FlexSelect-Lite": FlexSelect.lite(folder / "lite", retention_ratio=ratio, frames_per_set=FRAMES_PER_SET),
        "QuoTA, relevance": QuoTA("relevance", total_tokens=None, retention_ratio=ratio),
    }


def _figures(runs: list[list[Outcome]]) -> dict[str, Any]:
    """Of each method: its figures over all films, and "runs", the mean over the kinds of each run."""
    pooled = accuracy([outcome for run in runs for outcome in run])
    by_run = [accuracy(run) for run in runs]
    return {name: figures | {"runs": [one[name]["all"] for one in by_run]} for name, figures in pooled.items()}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", path.read_text()) if path.exists() else None
    return named[1] if named else platform.machine()


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
    lines += ["", "### Films of 30 s at compact positions, 10 % of the tokens kept", ""]
    lines += _table(found["accuracy_at_compact_positions"])
    for seconds in map(str, SECONDS):
        table = found["accuracy"][seconds]
        lines += ["", f"### Films of {seconds} s ({table['all tokens']['questions']} questions)", "", *_table(table)]
    return "\n".join(lines) + "\n"


def _table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Every figure of every method."""
    lines = [
        "| method | kept | all | least and most of the runs | " + " | ".join(KINDS) + " | needle kept |",
        "|---|---|---|---|" + "---|" * (len(KINDS) + 1),
    ]
    for name, row in rows.items():
        method, _, ratio = name.partition("|")
        cells = [_percent(row[kind]) for kind in KINDS] + [_percent(row["found"])]
        spread = f"{_percent(min(row['runs']))} to {_percent(max(row['runs']))}"
        kept = f"{float(ratio):.0%}" if ratio else "100%"
        lines.append(f"| {method} | {kept} | **{_percent(row['all'])}** | {spread} | {' | '.join(cells)} |")
    return lines


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
