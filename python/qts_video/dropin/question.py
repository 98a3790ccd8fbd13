"""Which part of a prompt is the question: the text of the last user turn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

GivenQuestion = str | Sequence[int] | torch.Tensor | Sequence[str] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class ChatMarkers:
    """How a chat template marks a user's turn, in token ids."""

    turn_start: int
    """Opens every turn."""
    user: tuple[int, ...]
    """Follows ``turn_start`` where the turn is the user's."""
    newline: tuple[int, ...]
    """Between ``user`` and the text of the turn."""
    turn_end: int
    """Closes every turn."""


def resolve_markers(tokenizer: Any, *, turn_start: str, user: str, newline: str, turn_end: str) -> ChatMarkers:
    """The ids of a chat template's markers in ``tokenizer``'s vocabulary.

    Raises ValueError where the tokenizer does not know a marker as one token.
    """

    def special(marker: str) -> int:
        token_id = tokenizer.convert_tokens_to_ids(marker)
        if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None):
            raise ValueError(f"the tokenizer has no chat marker {marker!r}: is it this model's tokenizer?")
        return token_id

    role = tuple(_encode(tokenizer, user))
    header = tuple(_encode(tokenizer, user + newline))
    if header[: len(role)] != role:  # a vocabulary that merges the role with the newline
        role = header
    return ChatMarkers(special(turn_start), role, header[len(role) :], special(turn_end))


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
    header = torch.tensor((markers.turn_start, *markers.user))
    turns = _occurrences(ids, header)
    if len(turns) == 0:
        raise ValueError(
            "no user turn in input_ids: the question is the text of the last user turn, so the prompt must come "
            "from the model's chat template; else give it with handle.question(...)"
        )
    start = int(turns[-1]) + len(header)
    turn = ids[start:]
    ends = (turn == markers.turn_end).nonzero()
    turn = turn[: int(ends[0])] if len(ends) else turn
    newline = torch.tensor(markers.newline, dtype=ids.dtype)
    if len(newline) and torch.equal(turn[: len(newline)], newline):
        start, turn = start + len(newline), turn[len(newline) :]
    text = (~torch.isin(turn, torch.tensor(vision_ids))).nonzero().squeeze(1)
    if len(text) == 0:
        raise ValueError("the last user turn in input_ids holds no text; give the question with handle.question(...)")
    return start + text


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


def _occurrences(ids: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Where ``pattern`` [K] starts in ``ids`` [L]: [n] int64, ascending."""
    if len(ids) < len(pattern):
        return ids.new_empty(0)
    return (ids.unfold(0, len(pattern), 1) == pattern).all(-1).nonzero().squeeze(1)
