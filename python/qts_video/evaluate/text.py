"""Exact match and token F1 of free answers, after the normalisation that SQuAD's evaluation made usual
(arXiv 1606.05250): lower case, no punctuation, no articles."""

import re
import unicodedata
from collections import Counter

_ARTICLES = {"a", "an", "the"}


def words(text: str) -> list[str]:
    """The normalised words of an answer."""
    kept = "".join(
        " " if unicodedata.category(character)[0] == "P" else character
        for character in unicodedata.normalize("NFKC", text).casefold()
    )
    return [word for word in re.split(r"\s+", kept) if word and word not in _ARTICLES]


def exact_match(prediction: str, answer: str) -> float:
    """1 where the words are the same in the same order, else 0."""
    return float(words(prediction) == words(answer))


def token_f1(prediction: str, answer: str) -> float:
    """2 common / (predicted + true), words counted as often as they occur; 1 where neither holds any."""
    predicted, true = Counter(words(prediction)), Counter(words(answer))
    if not predicted and not true:
        return 1.0
    return 2 * (predicted & true).total() / (predicted.total() + true.total())
