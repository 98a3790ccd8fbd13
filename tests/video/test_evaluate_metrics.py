"""What an answer means and how good answers are, against formulas that share no code with ours."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from qts_video import embedded
from qts_video.evaluate.classification import average_precision, classify, curve, roc_auc
from qts_video.evaluate.letters import letter_ids, letter_probabilities, parse_letter
from qts_video.evaluate.plots import confusion_page, curves_page
from qts_video.evaluate.text import exact_match, token_f1, words
from qts_video.plot.page import write

CHOICES = ("A dog", "A big dog", "The cat", "Green")

PARSED = {
    "B": "B",
    "b": "B",
    " (C) ": "C",
    "D.": "D",
    "**A**": "A",
    "B. A big dog": "B",
    "C: something else": "C",
    "A, because of its ears": "A",
    "A\nThe dog": "A",
    "The answer is B.": "B",
    "the answer is (D)": "D",
    "Answer: C": "C",
    "The answer is option B because it is big": "B",
    "Option A": "A",
    "The correct choice is D, I think": "D",
    "a dog": "A",
    "It is a big dog.": "B",
    "I see the cat there": "C",
    "green!": "D",
    "I think (C) is shown": "C",
    "A man walks": None,
    "The answer is A man": None,
    "The cat or a dog": None,
    "(A) or (B)": None,
    "E": None,
    "Option E": None,
    "greenish": None,
    "": None,
    "I don't know": None,
}


@pytest.mark.parametrize("text, letter", PARSED.items())
def test_parsed_letters(text, letter):
    assert parse_letter(text, CHOICES) == letter


@given(st.text(), st.lists(st.text(), min_size=2, max_size=6))
def test_any_text_has_one_letter_of_the_choices_or_none(text, choices):
    assert parse_letter(text, choices) in {None, *"ABCDEF"[: len(choices)]}


def test_probabilities_of_letters():
    processor = embedded.build_processor()
    ids = letter_ids(processor, 4)
    assert [processor.tokenizer.decode([i]) for i in ids] == list("ABCD")
    logits = torch.full((600,), 9.0)
    logits[ids] = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    assert letter_probabilities(logits, ids) == pytest.approx([0.1, 0.2, 0.3, 0.4])


def pairs(positive, scores):
    """P(positive > negative) over all pairs, ties one half."""
    wins = [
        (p > n) + 0.5 * (p == n) for p, a in zip(scores, positive, strict=True) if a for n in scores[~positive]
    ]  # fmt: skip
    return float(np.mean(wins))


def steps(positive, scores):
    """Average precision, threshold by threshold."""
    area, before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        taken = scores >= threshold
        recall, precision = positive[taken].sum() / positive.sum(), positive[taken].mean()
        area, before = area + (recall - before) * precision, recall
    return float(area)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40).filter(
        lambda rows: len({right for right, _ in rows}) == 2
    )
)
def test_areas(rows):
    positive = np.array([right for right, _ in rows])
    scores = np.array([score / 7 for _, score in rows])
    assert roc_auc(positive, scores) == pytest.approx(pairs(positive, scores), abs=1e-12)
    assert average_precision(positive, scores) == pytest.approx(steps(positive, scores), abs=1e-12)
    assert roc_auc(positive, -scores) == pytest.approx(1 - roc_auc(positive, scores), abs=1e-12)


def test_areas_by_hand():
    positive, scores = np.array([0, 0, 1, 1], bool), np.array([0.1, 0.4, 0.35, 0.8])
    assert roc_auc(positive, scores) == 0.75
    assert average_precision(positive, scores) == pytest.approx(0.5 + 0.5 * 2 / 3)
    false, true, thresholds = curve(positive, scores)
    assert (false.tolist(), true.tolist()) == ([0, 0, 1, 1, 2], [0, 1, 1, 2, 2])
    assert thresholds.tolist() == [np.inf, 0.8, 0.4, 0.35, 0.1]


LETTERS = "ABC"


def plain_metrics(truths, predictions):
    """Per letter, from the definitions."""
    names = sorted({*truths, *(p for p in predictions if p)})
    out = []
    for name in names:
        both = sum(t == p == name for t, p in zip(truths, predictions, strict=True))
        precision = both / predictions.count(name) if name in predictions else 0
        recall = both / truths.count(name) if name in truths else 0
        out.append((precision, recall, 2 * precision * recall / (precision + recall) if both else 0))
    return [float(np.mean(column)) for column in zip(*out, strict=True)]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(LETTERS), st.sampled_from([*LETTERS, None])), min_size=1, max_size=20))
def test_precision_recall_and_f1(rows):
    truths, predictions = [truth for truth, _ in rows], [prediction for _, prediction in rows]
    metrics = classify(truths, predictions, [[0.2, 0.3, 0.5]] * len(rows))
    ours = [metrics[name] for name in ("precision", "recall", "f1")]
    assert ours == pytest.approx(plain_metrics(truths, predictions))
    assert metrics["accuracy"] == pytest.approx(np.mean([t == p for t, p in rows]))
    assert metrics["unparsed"] == predictions.count(None)
    assert sum(sum(row.values()) for row in metrics["confusion"].values()) == len(rows)
    one_letter = len(set(truths)) == 1
    assert metrics["roc_auc"] == (None if one_letter else 0.5)  # all scores are equal
    assert metrics["chance"] == pytest.approx(1 / 3)


def test_different_numbers_of_choices():
    """A letter's curve is of the samples that have this choice."""
    probabilities = [[0.9, 0.1], [0.2, 0.3, 0.5], [0.6, 0.1, 0.3], [0.4, 0.6]]
    metrics = classify(["A", "C", "A", "B"], ["A", "C", "C", "B"], probabilities)
    assert metrics["by_letter"]["C"]["roc_auc"] == 1.0  # 0.5 against 0.3; the others have no C
    assert metrics["by_letter"]["A"]["roc_auc"] == 1.0
    assert metrics["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert metrics["confusion"]["A"] == {"A": 1, "B": 0, "C": 1, "none": 0}


def test_what_can_not_be_measured():
    with pytest.raises(ValueError, match="at least one answer, got none"):
        classify([], [], [])
    with pytest.raises(ValueError, match="probabilities must be finite"):
        classify(["A"], ["A"], [[float("nan"), 0.5]])


def test_free_answers():
    assert words("The  red, (big) Circle’s") == ["red", "big", "circle", "s"]
    assert exact_match("A red circle.", "red circle") == 1
    assert exact_match("circle red", "red circle") == 0
    assert token_f1("red red circle", "the red square") == pytest.approx(2 * 1 / (3 + 2))
    assert token_f1("blue", "red") == 0
    assert token_f1("the", "a!") == 1
    assert token_f1("", "red") == 0


@pytest.mark.parametrize("letters", ["AB", "ABCDEFGHIJKLMN"])
def test_pictures(letters, tmp_path):
    """They are drawn for any number of letters, with answers that name none."""
    truths = list(letters) * 3
    predictions = [None if i % 5 == 0 else letters[i * i % len(letters)] for i in range(len(truths))]
    probabilities = np.random.default_rng(0).dirichlet([1] * len(letters), len(truths)).tolist()
    metrics = classify(truths, predictions, probabilities)
    pages = {
        "confusion": confusion_page(metrics, title="t", subtitle="s"),
        "curves": curves_page(metrics, truths, probabilities, title="t", subtitle="s"),
    }
    for name, page in pages.items():
        assert write(tmp_path / f"{name}.png", page).read_bytes()[:4] == b"\x89PNG"
    axes = pages["curves"].draw("t", "s").axes
    assert [len(one.get_lines()) for one in axes] == [len(letters) + 1, len(letters)]
    texts = [text.get_text() for text in pages["confusion"].draw("t", "s").axes[0].texts]
    assert len(texts) == len(letters) * (len(letters) + 1)
