"""Which letter an answer means, and how likely each letter is."""

import re
from collections.abc import Sequence
from typing import Any

import torch

from qts_video.data.collator import answer_ids
from qts_video.data.sample import LETTERS

_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_FIRST = re.compile(r"\W*([A-Z])(?:[).:,\]*]|\s*\n)")
# "The answer is A man" names no letter, "the answer is B because" does.
_NAMED = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is|\s*:)?(?i:\s+option)?\W*(A(?!\s+[a-z])|[B-Z])(?!\w)")
_BRACKETED = re.compile(r"[(\[]([A-Z])[)\]]")


def parse_letter(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that ``text`` names; None where it names none, or several.

    In this order: the text is a letter alone; it begins with one and a mark ("B. red", "(B)"); it says "answer",
    "option" or "choice" and a letter; it is, or holds as whole words, the text of one choice and of no other; it holds
    one letter in brackets.
    """
    letters = LETTERS[: len(choices)]
    if len(set(_BRACKETED.findall(text)) & set(letters)) > 1:
        return None
    for pattern in (_ALONE.fullmatch, _FIRST.match):
        match = pattern(text.strip())
        if match and match[1].upper() in letters:
            return match[1].upper()
    for found in (_NAMED.findall(text), _said(text, choices), _BRACKETED.findall(text)):
        named = {letter.upper() for letter in found} & set(letters)
        if len(named) == 1:
            return named.pop()
    return None


def _said(text: str, choices: Sequence[str]) -> list[str]:
    """Letters of the choices whose words ``text`` holds, without those that are part of a longer one."""
    words = _words(text)
    said = [(letter, _words(choice)) for letter, choice in zip(LETTERS, choices, strict=False)]
    said = [(letter, choice) for letter, choice in said if choice.strip() and choice in words]
    return [letter for letter, choice in said if not any(choice in other != choice for _, other in said)]


def _words(text: str) -> str:
    """The words of ``text``, with a space before and behind each."""
    words = re.findall(r"[^\W_]+", text.casefold())
    return f" {' '.join(words)} "


def letter_ids(processor: Any, count: int) -> list[int]:
    """The token that each of the first ``count`` letters begins with, as an answer.

    Raises:
        ValueError: two letters begin with the same token.
    """
    ids = [answer_ids(processor, letter)[0] for letter in LETTERS[:count]]
    if len(set(ids)) < len(ids):
        raise ValueError(f"the letters' first tokens must differ, got {ids}")
    return ids


def letter_probabilities(logits: torch.Tensor, ids: Sequence[int]) -> list[float]:
    """Softmax over the letters alone.

    Args:
        logits: [V] of an answer's first token.
        ids: of the letters' tokens.
    """
    return logits[torch.tensor(ids, device=logits.device)].double().softmax(-1).tolist()
