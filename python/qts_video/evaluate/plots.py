"""Pictures of multiple-choice results: who is taken for whom, and the curves of each letter against the rest."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qts_video.evaluate.classification import NONE, curve, one_versus_rest
from qts_video.plot.page import Page
from qts_video.plot.sheet import HEAT, INK, LEFT, RELEVANCE, Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 5.2  # inches
_LINES = ("-", "--", "-.", ":")


def confusion_page(metrics: dict[str, Any], *, title: str, subtitle: str) -> Page:
    """Counts by right letter (rows) and predicted letter (columns)."""
    return Page(
        title,
        subtitle,
        lambda title, subtitle: _draw_confusion(metrics["confusion"], title, subtitle),
        f"Confusion matrix of {len(metrics['confusion'])} letters.",
    )


def curves_page(
    metrics: dict[str, Any],
    truths: Sequence[str],
    probabilities: Sequence[Sequence[float]],
    *,
    title: str,
    subtitle: str,
) -> Page:
    """The ROC curve and the precision-recall curve of each letter against the rest."""
    return Page(
        title,
        subtitle,
        lambda title, subtitle: _draw_curves(metrics["by_letter"], truths, probabilities, title, subtitle),
        "ROC and precision-recall curves of every letter against the rest.",
    )


def _draw_confusion(confusion: dict[str, dict[str, int]], title: str, subtitle: str) -> "Figure":
    letters = list(confusion)
    columns = [*letters, NONE] if any(row[NONE] for row in confusion.values()) else letters
    counts = np.array([[confusion[truth][name] for name in columns] for truth in letters])
    width = SIDE * len(columns) / len(letters)
    sheet = Sheet(SIDE + 1.3, title, subtitle)
    axes = sheet.axes(LEFT, 0.6, width, SIDE)
    axes.imshow(counts, cmap=HEAT, aspect="auto", vmin=0)
    for (row, column), count in np.ndenumerate(counts):
        dark = count < counts.max() / 2
        axes.text(column, row, f"{count:,}", ha="center", va="center", color=INK["dark" if dark else "light"])
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(letters)), letters)
    axes.set_xlabel("predicted")
    axes.set_ylabel("right")
    return sheet.figure


def _draw_curves(
    by_letter: dict[str, dict[str, float | None]],
    truths: Sequence[str],
    probabilities: Sequence[Sequence[float]],
    title: str,
    subtitle: str,
) -> "Figure":
    import matplotlib

    sheet = Sheet(SIDE + 1.5, title, subtitle)
    roc = sheet.axes(LEFT, 0.6, SIDE, SIDE, xlabel="false positives, share", ylabel="true positives, share")
    precision = sheet.axes(LEFT + SIDE + 1.4, 0.6, SIDE, SIDE, xlabel="recall", ylabel="precision")
    colours = matplotlib.colormaps["tab10"].colors
    for number, (letter, values) in enumerate(by_letter.items()):
        if values["roc_auc"] is None:
            continue
        false, true, _ = curve(*one_versus_rest(letter, truths, probabilities))
        style = {"color": colours[number % 10], "linestyle": _LINES[number // 10 % 4], "linewidth": 2}
        roc.plot(false / false[-1], true / true[-1], label=f"{letter}, area {values['roc_auc']:.3f}", **style)
        recall, right = true / true[-1], np.divide(true[1:], true[1:] + false[1:])
        precision.step(recall, np.append(right[:1], right), label=f"{letter}, area {values['pr_auc']:.3f}", **style)
    roc.plot([0, 1], [0, 1], color=RELEVANCE, linewidth=1, linestyle=":", label="chance")
    for axes in (roc, precision):
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower right" if axes is roc else "lower left", frameon=False)
    return sheet.figure
