"""Which part of a prompt is the question: the text of the last user turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

GivenQuestion = str | Sequence[int] | torch.Tensor | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class ChatMarkers:
    """How a chat template marks a user's turn, in token ids."""

    opening: tuple[tuple[int, ...], ...]
    """What opens a user's turn: a sequence for each way to write it."""
    closing: tuple[tuple[int, ...], ...]
    """What ends it, likewise."""
    blanks: tuple[int, ...] = ()
    """Tokens of white space alone, which the template puts between its own tokens and the text."""


def resolve_markers(
    tokenizer: Any, *, turn_start: str, user: str, newline: str, turn_end: str, blanks: Sequence[str] = ()
) -> ChatMarkers:
    """The ids of a ChatML template's markers in ``tokenizer``'s vocabulary.

    Args:
        tokenizer: of the model.
        turn_start, turn_end: tokens that open and close every turn.
        user, newline: text behind ``turn_start`` where the turn is the user's; the newline may be missing.
        blanks: white space that the template puts around the text of a turn.

    Raises ValueError where the tokenizer does not know a marker as one token.
    """

    def special(marker: str) -> int:
        token_id = tokenizer.convert_tokens_to_ids(marker)
        if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
            raise ValueError(f"the tokenizer has no chat marker {marker!r}: is it this model's tokenizer?")
        return token_id

    start, end = special(turn_start), special(turn_end)
    opening = []
    for role in (user + newline, user):
        ids = _encode(tokenizer, turn_start + role)
        opening.append(tuple(ids[ids.index(start) :]))
    return ChatMarkers(tuple(opening), ((end,),), _blanks(tokenizer, blanks))


def resolve_text_markers(
    tokenizer: Any, *, opening: Sequence[str], closing: Sequence[str], blanks: Sequence[str] = ()
) -> ChatMarkers:
    """The same for a template whose markers are plain text of any number of tokens, such as Vicuna's ``USER:`` and
    ``ASSISTANT:``.

    Args:
        tokenizer: of the model.
        opening: the texts that open a user's turn.
        closing: the texts that end it.
        blanks: white space that the template puts around the text of a turn.
    """
    opened, closed = ([ids for text in texts for ids in _spellings(tokenizer, text)] for texts in (opening, closing))
    return ChatMarkers(tuple(opened), tuple(closed), _blanks(tokenizer, blanks))


def find_question(ids: torch.Tensor, markers: ChatMarkers, vision_ids: Sequence[int]) -> torch.Tensor:
    """Where the last user turn's text is.

    Args:
        ids: [L] int64 on the CPU, one sample's prompt without its padding.
        markers: of the chat template that wrote the prompt.
        vision_ids: ids that are never text: placeholders, and the tokens around an image or a video.

    Returns:
        [Lq] int64: the columns of the text before and after the vision spans of that turn, without the
        template's own tokens.

    Raises:
        ValueError: there is no user turn, or it holds no text.
    """
    openings = [(int(found[-1]), len(text)) for text in markers.opening if len(found := occurrences(ids, text))]
    if not openings:
        raise ValueError(
            "no user turn in input_ids: the question is the text of the last user turn, so the prompt must come "
            "from the model's chat template; else give it with handle.question(...)"
        )
    start = sum(max(openings))  # the last one, as long as it can be read
    turn = ids[start:]
    ends = [int(found[0]) for text in markers.closing if len(found := occurrences(turn, text))]
    turn = turn[: min(ends, default=len(turn))]
    text = (~torch.isin(turn, torch.tensor(vision_ids))).nonzero().squeeze(1)
    stretches = text.tensor_split((text.diff() > 1).nonzero().squeeze(1) + 1)
    blanks = torch.tensor(markers.blanks, dtype=ids.dtype)
    text = torch.cat([_strip(stretch, torch.isin(turn[stretch], blanks)) for stretch in stretches])
    if len(text) == 0:
        raise ValueError("the last user turn in input_ids holds no text; give the question with handle.question(...)")
    return start + text


def _strip(columns: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """``columns`` [n] without those at its two ends that are ``blank`` [n] bool."""
    words = (~blank).nonzero().squeeze(1)
    return columns[int(words[0]) : int(words[-1]) + 1] if len(words) else columns[:0]


def read_question(given: GivenQuestion, tokenizer: Any | None) -> list[torch.Tensor]:
    """A question that the user gave, as token ids: one tensor [Lq] int64 that serves every sample, or one a
    sample.

    Raises:
        ValueError: text without a tokenizer, an empty question or an empty list.
        TypeError: neither text, ids nor a list of them.
    """
    if isinstance(given, str):
        given = [given]
    elif isinstance(given, torch.Tensor):
        given = [given] if given.ndim == 1 else list(given)
    elif isinstance(given, Sequence) and given and all(isinstance(item, int) for item in given):
        given = [given]
    if not isinstance(given, Sequence):
        raise TypeError(
            f"a question is text, token ids, or a list with one of them a sample; got {type(given).__name__}"
        )
    questions = [_question_ids(item, tokenizer) for item in given]
    if not questions or any(len(ids) == 0 for ids in questions):
        raise ValueError("a question must hold at least one token")
    return questions


def _question_ids(question: str | Sequence[int] | torch.Tensor, tokenizer: Any | None) -> torch.Tensor:
    if isinstance(question, str):
        if tokenizer is None:
            raise ValueError("a question given as text needs attach(..., tokenizer=...); else give its token ids")
        return torch.tensor(_encode(tokenizer, question), dtype=torch.int64)
    ids = torch.as_tensor(question)
    if ids.numel() == 0:
        return ids.new_empty(0, dtype=torch.int64)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(
            f"a question's token ids must be integers of shape [L], got {ids.dtype} of shape {list(ids.shape)}"
        )
    return ids.to("cpu", torch.int64)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _blanks(tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
    return tuple(sorted({token_id for text in texts for token_id in _encode(tokenizer, text)}))


def _spellings(tokenizer: Any, text: str) -> set[tuple[int, ...]]:
    """The ids of ``text`` at the start of a prompt, behind a space and behind a line break: many vocabularies merge a
    space with what follows."""
    spellings = {tuple(_encode(tokenizer, text))}
    for before, space in (("a", " "), ("a\n", "")):
        head, whole = _encode(tokenizer, before), _encode(tokenizer, before + space + text)
        if whole[: len(head)] == head:
            spellings.add(tuple(whole[len(head) :]))
    return spellings


def occurrences(ids: torch.Tensor, pattern: Sequence[int]) -> torch.Tensor:
    """Where ``pattern`` [K] starts in ``ids`` [L]: [n] int64, ascending."""
    if len(ids) < len(pattern):
        return ids.new_empty(0)
    return (ids.unfold(0, len(pattern), 1) == torch.tensor(pattern)).all(-1).nonzero().squeeze(1)
