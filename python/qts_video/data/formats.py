"""What a record of each format is made of: a dict from a file becomes questions with their answers.

docs/data.md lists the fields.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qts_video.data.sample import LETTERS

VIDEO = ("video", "video_path", "video_id", "video_name", "vid")
QUESTION = ("question", "query")
ANSWER = ("answer", "correct_answer", "answer_letter")
ANSWER_INDEX = ("answer_index", "answer_idx")
CHOICES = ("options", "choices", "candidates")
ID = ("id", "question_id", "qid", "sample_id")
CONVERSATION = ("conversations", "conversation", "messages")

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
_PLACEHOLDER = re.compile(r"[ \t]*<(?:image|video)>[ \t]*\n?")
_LETTERED = re.compile(r"\s*\(?([A-Z])[.):]+\s*(\S.*)")
_BARE_LETTER = re.compile(r"\(?([A-Za-z])[.):]*")


class RecordError(ValueError):
    """A record that can't be used. The message says what was expected and what came; with the file and the line where
    both are known."""


@dataclass(frozen=True)
class Record:
    """A question about a video and its answer, before anything of the video is looked for."""

    media: str
    """Video file or frame folder, as the file names it."""
    question: str
    answer: str
    id: str = ""
    choices: tuple[str, ...] = ()
    source: str = ""
    """file:line"""
    number: int = 0
    """Its place among the questions of the file."""


def detect(fields: Mapping[str, Any]) -> str:
    """The format of a record, by its fields. Raises RecordError where it is none."""
    if any(name in fields for name in CONVERSATION):
        return "llava_video_178k"
    if any(name in fields for name in (*CHOICES, "A")):
        return "vscq"
    if not any(name in fields for name in QUESTION):
        raise RecordError(
            f"expected a record with {_any(QUESTION)}, or with {_any(CONVERSATION)}; got the fields {list(fields)}"
        )
    return "vscq" if _lettered(str(_first(fields, QUESTION))) else "vqa"


def _vscq(fields: Mapping[str, Any]) -> list[Record]:
    question, choices = _text(fields, QUESTION), _choices(fields)
    if choices is None:
        question, choices = _lettered(question) or (question, [])
    if not 2 <= len(choices) <= len(LETTERS):
        raise RecordError(
            f"expected 2 to {len(LETTERS)} choices in {_any(CHOICES)}, in A, B, ... or as lines 'A. ...' of the "
            f"question, got {len(choices)}"
        )
    answer = _letter(fields, choices)
    return [Record(_media(fields), _without_placeholder(question), answer, _id(fields), tuple(choices))]


def _vqa(fields: Mapping[str, Any]) -> list[Record]:
    question = _without_placeholder(_text(fields, QUESTION))
    return [Record(_media(fields), question, _text(fields, ANSWER), _id(fields))]


def _llava_video_178k(fields: Mapping[str, Any]) -> list[Record]:
    turns = _first(fields, CONVERSATION)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError(f"expected {_any(CONVERSATION)} to be a list of turns, got {_shown(turns)}")
    said = [_turn(turn) for turn in turns]
    roles = [role for role, _ in said]
    if not roles or roles != ["human", "gpt"] * (len(roles) // 2):
        raise RecordError(f"expected turns of human and gpt by turns, got {roles}")
    media, name = _media(fields), _id(fields)
    rounds = list(zip(said[::2], said[1::2], strict=True))
    return [
        Record(media, _without_placeholder(question), answer, f"{name}#{number}" if name and len(rounds) > 1 else name)
        for number, ((_, question), (_, answer)) in enumerate(rounds, 1)
    ]


FORMATS: dict[str, Callable[[Mapping[str, Any]], list[Record]]] = {
    "vscq": _vscq,
    "vqa": _vqa,
    "llava_video_178k": _llava_video_178k,
}


def _turn(turn: Mapping[str, Any]) -> tuple[str, str]:
    role = _ROLES.get(turn.get("from", turn.get("role")))
    if role is None:
        raise RecordError(f"expected a turn from one of {', '.join(_ROLES)}, got {_shown(dict(turn))}")
    return role, _text(turn, ("value", "content"))


def _choices(fields: Mapping[str, Any]) -> list[str] | None:
    """The texts of the choices; None where no field holds them."""
    given = _first(fields, CHOICES)
    if given is None:
        named = [letter for letter in LETTERS if letter in fields]
        if not named:
            return None
        given = {letter: fields[letter] for letter in named}
    if isinstance(given, str):
        found = _lettered(given)
        if found is None or found[0]:
            raise RecordError(f"expected choices in lines 'A. ...', 'B. ...', got {_shown(given)}")
        given = found[1]
    if isinstance(given, dict):
        if list(given) != list(LETTERS[: len(given)]):
            raise RecordError(f"expected choices named A, B, ... in this order, got {list(given)}")
        given = list(given.values())
    if not isinstance(given, list) or not all(isinstance(choice, str | int | float) for choice in given):
        raise RecordError(f"expected choices as a list of texts, got {_shown(given)}")
    texts = [str(choice).strip() for choice in given]
    if not all(texts):
        raise RecordError(f"expected choices with a text each, got {_shown(given)}")
    marked = [_LETTERED.fullmatch(text) for text in texts]
    if all(match and match[1] == letter for match, letter in zip(marked, LETTERS, strict=False)):
        return [match[2] for match in marked]
    return texts


def _lettered(text: str) -> tuple[str, list[str]] | None:
    """The text before the lines "A. ...", "B. ...", and what those say; None where there are fewer than two. What is
    behind the last is an instruction how to answer, and left out."""
    head: list[str] = []
    choices: list[str] = []
    for line in text.splitlines():
        match = _LETTERED.fullmatch(line)
        if match and match[1] == LETTERS[len(choices) : len(choices) + 1]:
            choices.append(match[2].strip())
        elif not choices:
            head.append(line)
    return ("\n".join(head).strip(), choices) if len(choices) > 1 else None


def _letter(fields: Mapping[str, Any], choices: list[str]) -> str:
    """The letter of the right choice."""
    index = _first(fields, ANSWER_INDEX)
    if index is not None and _first(fields, ANSWER) is None:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
            raise RecordError(f"expected {_any(ANSWER_INDEX)} from 0 to {len(choices) - 1}, got {_shown(index)}")
        return LETTERS[index]
    answer, letters = _text(fields, ANSWER), LETTERS[: len(choices)]
    bare = _BARE_LETTER.fullmatch(answer)
    if bare and bare[1].upper() in letters:
        return bare[1].upper()
    same = [letter for letter, choice in zip(letters, choices, strict=True) if _folded(choice) == _folded(answer)]
    if len(same) == 1:
        return same[0]
    marked = _LETTERED.fullmatch(answer)
    if marked and marked[1] in letters and _folded(marked[2]) == _folded(choices[letters.index(marked[1])]):
        return marked[1]
    raise RecordError(f"expected an answer from A to {letters[-1]}, or the text of one choice, got {_shown(answer)}")


def _media(fields: Mapping[str, Any]) -> str:
    return _text(fields, VIDEO)


def _id(fields: Mapping[str, Any]) -> str:
    name = _first(fields, ID)
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise RecordError(f"expected {_any(ID)} to be a text or a number, got {_shown(name)}")
    return "" if name is None else str(name)


def _text(fields: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """The first of the fields that is there, a text that is not empty. Numbers count as texts."""
    value = _first(fields, names)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"expected a text in {_any(names)}, got {_shown(value)} (fields: {', '.join(fields)})")
    return value.strip()


def _without_placeholder(question: str) -> str:
    """``question`` without "<image>" and "<video>", which stand for the video itself."""
    text = _PLACEHOLDER.sub("", question).strip()
    if not text:
        raise RecordError(f"expected a question, got {_shown(question)}")
    return text


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def _any(names: tuple[str, ...]) -> str:
    return " or ".join(repr(name) for name in names)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
