"""Accuracy, precision, recall and the areas under curves, of letters. numpy alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from qts_video.data.sample import LETTERS

NONE = "none"
"""Column of the confusion matrix for answers that name no letter."""


def classify(
    truths: Sequence[str], predictions: Sequence[str | None], probabilities: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Metrics of multiple-choice answers.

    Args:
        truths: the right letters.
        predictions: the predicted ones; None, which is never right, where the answer named none.
        probabilities: for every sample, one of each of its choices.

    Returns:
        "accuracy"; "precision", "recall" and "f1": unweighted means over the letters that are right or predicted
        somewhere, where one without predictions has precision 0, and one that is never right recall 0; "roc_auc" and
        "pr_auc" (average precision): means over letters of each against the rest, among the samples that have this
        choice, without the letters that are right always or never (None where none is left); "by_letter", the same of
        every letter; "confusion": {truth: {prediction: count}}; "unparsed" and "chance", the mean of 1 / choices.

    Raises:
        ValueError: no samples, or a probability that is not a number.
    """
    if not truths:
        raise ValueError("expected at least one answer, got none")
    if not all(np.isfinite(row).all() for row in probabilities):
        raise ValueError("probabilities must be finite: the model's logits are not")
    letters = sorted({*truths, *(letter for letter in predictions if letter is not None)})
    confusion = {truth: dict.fromkeys([*letters, NONE], 0) for truth in letters}
    for truth, prediction in zip(truths, predictions, strict=True):
        confusion[truth][prediction or NONE] += 1
    by_letter = {letter: _of_letter(letter, confusion) for letter in letters}
    for letter, values in by_letter.items():
        positive, scores = one_versus_rest(letter, truths, probabilities)
        one_sided = positive.all() or not positive.any()
        values["roc_auc"] = None if one_sided else roc_auc(positive, scores)
        values["pr_auc"] = None if one_sided else average_precision(positive, scores)
    return {
        "accuracy": sum(confusion[letter][letter] for letter in letters) / len(truths),
        **{name: _mean(values[name] for values in by_letter.values()) for name in by_letter[letters[0]]},
        "chance": float(np.mean([1 / len(row) for row in probabilities])),
        "unparsed": sum(row[NONE] for row in confusion.values()),
        "by_letter": by_letter,
        "confusion": confusion,
    }


def one_versus_rest(
    letter: str, truths: Sequence[str], probabilities: Sequence[Sequence[float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Of the samples that have this choice: whether it is the right one [n] bool, and its probability [n]."""
    place = LETTERS.index(letter)
    has = [(truth == letter, row[place]) for truth, row in zip(truths, probabilities, strict=True) if len(row) > place]
    return np.array([right for right, _ in has], bool), np.array([score for _, score in has], float)


def roc_auc(positive: np.ndarray, scores: np.ndarray) -> float:
    """P(a positive scores higher than a negative), equal scores counting one half (Mann-Whitney)."""
    false, true, _ = curve(positive, scores)
    return float(np.sum(np.diff(false) * (true[1:] + true[:-1])) / (2 * true[-1] * false[-1]))


def average_precision(positive: np.ndarray, scores: np.ndarray) -> float:
    """sum over thresholds of (recall_i - recall_{i-1}) * precision_i: the area under the steps, not interpolated."""
    false, true, _ = curve(positive, scores)
    precision = true[1:] / (true[1:] + false[1:])
    return float(np.sum(np.diff(true) / true[-1] * precision))


def curve(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many negatives and positives score at least each threshold: from above all scores (0, 0) through every
    different score, descending. Three [k + 1] arrays: false positives, true positives, thresholds."""
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    last = np.append(np.diff(scores) != 0, True)
    true = np.cumsum(positive)[last]
    total = np.flatnonzero(last) + 1
    return np.append(0, total - true), np.append(0, true), np.append(np.inf, scores[last])


def _of_letter(letter: str, confusion: dict[str, dict[str, int]]) -> dict[str, float]:
    right = confusion[letter][letter]
    predicted = sum(row[letter] for row in confusion.values())
    true = sum(confusion[letter].values())
    return {
        "precision": right / predicted if predicted else 0.0,
        "recall": right / true if true else 0.0,
        "f1": 2 * right / (predicted + true),
    }


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
