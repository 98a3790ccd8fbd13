"""Recall@K by layer: how much of a planted needle frame a layer's relevance finds (FlexSelect, arXiv 2506.00993)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from qts_kernels import topn

from .page import Page, Table
from .sheet import KEPT, LEFT, RELEVANCE, RIGHT, WIDTH, Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def recall_at_k(scores: torch.Tensor, needle: torch.Tensor) -> float:
    """|Top-K(scores) intersect needle| / K with K = len(needle). Of equal scores the earlier token comes first.

    Args:
        scores: [M] relevance of every token of the video.
        needle: [K] int64, the tokens of the needle frame, each once; 1 <= K <= M.

    Raises:
        ValueError: K or an index is out of range.
    """
    total, k = len(scores), len(needle)
    if not 1 <= k <= total or int(needle.min()) < 0 or int(needle.max()) >= total:
        raise ValueError(f"the needle must be 1 to {total} indices of {total} tokens, got {needle.tolist()}")
    top, _ = topn(scores, k)
    return torch.isin(top, needle.to(top.device)).sum().item() / k


def best_layer(recalls: Mapping[int, Sequence[float]]) -> int:
    """The layer whose mean recall over the trials is largest; of equal ones the earliest, which costs least."""
    return min(recalls, key=lambda layer: (-np.mean(recalls[layer]), layer))


def recall_table(recalls: Mapping[int, Sequence[float]], tokens: int, chance: float) -> Table:
    """Mean recall of every layer, and the least and most of the trials.

    Args:
        recalls: of each layer, the recall of every trial, in [0, 1].
        tokens: K.
        chance: expected recall of scores that know nothing: K / M.
    """
    rows = [
        [str(layer), *(f"{100 * value:.1f} %" for value in (np.mean(of), min(of), max(of)))]
        for layer, of in sorted(recalls.items())
    ]
    trials = len(next(iter(recalls.values())))
    caption = f"Recall@{tokens} over {_count(trials, 'trial')}; chance is {100 * chance:.1f} %"
    return Table(caption, ("layer", "mean", "least", "most"), rows)


def recall_page(
    recalls: Mapping[int, Sequence[float]], tokens: int, chance: float, *, title: str, subtitle: str = ""
) -> Page:
    """Recall by layer as a page. The arguments are those of ``recall_table``."""
    best, table = best_layer(recalls), recall_table(recalls, tokens, chance)
    most = f"{100 * np.mean(recalls[best]):.1f} %"
    return Page(
        title,
        subtitle,
        lambda title, subtitle: draw_recall(recalls, tokens, chance, title=title, subtitle=subtitle),
        f"Line plot of recall by layer. Layer {best} is best with {most}. {table.caption}.",
        (table,),
    )


def draw_recall(
    recalls: Mapping[int, Sequence[float]], tokens: int, chance: float, *, title: str = "", subtitle: str = ""
) -> "Figure":
    """Mean recall by layer as a line, every trial as a faint one, and the best layer marked."""
    layers = sorted(recalls)
    trials = np.array([recalls[layer] for layer in layers]) * 100  # [layers, trials]
    mean = trials.mean(axis=1)
    sheet = Sheet(5.6, title, subtitle)
    axes = sheet.axes(LEFT, 0.35, WIDTH - LEFT - RIGHT, 4.5)
    axes.spines[["top", "right"]].set_visible(False)
    if trials.shape[1] > 1:
        axes.plot(layers, trials, color=RELEVANCE, alpha=0.3, linewidth=1)
        axes.plot([], [], color=RELEVANCE, alpha=0.3, linewidth=1, label="one trial")
    label = "mean" if trials.shape[1] > 1 else "recall"
    axes.plot(layers, mean, color=RELEVANCE, linewidth=2.2, marker="o", markersize=5, label=label)
    axes.axhline(100 * chance, color="#888888", linewidth=1.2, linestyle="--", label=f"chance, {100 * chance:.1f} %")
    best = best_layer(recalls)
    height = mean[layers.index(best)]
    axes.plot(best, height, marker="o", markersize=13, color="none", markeredgecolor=KEPT, markeredgewidth=2.4)
    _, top = axes.get_ylim()
    axes.set_ylim(0, min(1.08 * top, 112))
    axes.annotate(
        f"layer {best}: {height:.1f} %",
        (best, height),
        xytext=(0, 13),
        textcoords="offset points",
        ha=_side(layers.index(best), len(layers)),
        fontsize=11,
        weight="bold",
        bbox={"facecolor": sheet.figure.get_facecolor(), "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )
    axes.set_xticks(layers if len(layers) <= 40 else layers[:: len(layers) // 20])
    axes.set_xlabel("layer (from 0)")
    axes.set_ylabel(f"Recall@{tokens}, %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=10, frameon=False, ncols=3)
    return sheet.figure


def _side(place: int, count: int) -> str:
    """So that the words at either end stay within the axes."""
    if count > 1 and place == 0:
        return "left"
    return "right" if count > 1 and place == count - 1 else "center"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
