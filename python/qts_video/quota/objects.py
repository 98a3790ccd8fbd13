"""Read a list of things out of what a language model wrote, whatever it wrote. Nothing of it is executed."""

import json
import re

MAX_TEXT, MAX_OBJECTS, MAX_CHARACTERS, MAX_WORDS = 4000, 16, 64, 6
_NOTHING = {"", "yes", "no", "none", "null", "nil", "nothing", "empty", "n/a", "na", "not applicable"}
# A quote inside a word is an apostrophe.
_QUOTED = re.compile(r'"([^"\n]*)"|(?<!\w)\'((?:[^\'\n]|\'(?=\w))*)\'|“([^”\n]*)”')
_MARKED = re.compile(r"^\s*(?:[-*•+]|\(?\d{1,3}[.):])\s+(.*)$")
_EXPLANATION = re.compile(r":\**\s|\s[-–—(]")
_MARKS = " \"'`*_.,;:!?()[]{}<>“”"
_SEPARATOR = re.compile(r"[,;\n]|\s(?:and|or)\s")


def parse_objects(text: str) -> list[str]:
    """The things that ``text`` lists, in order, each once; [] where it lists none.

    Takes a JSON list, a bracketed list with or without quotes and end, numbered or marked lines (an explanation behind
    a name is left out), and names between commas, with or without a word and a colon in front. "none", "null" and their
    like are nothing. What has more than ``MAX_WORDS`` words or ``MAX_CHARACTERS`` characters is prose. At most
    ``MAX_OBJECTS`` are returned, of the first ``MAX_TEXT`` characters. Never raises.
    """
    found: dict[str, str] = {}
    for item in _items(text[:MAX_TEXT]):
        name = _clean(item)
        if name is not None:
            found.setdefault(name.casefold(), name)
    return list(found.values())[:MAX_OBJECTS]


def _items(text: str) -> list[str]:
    text = text.replace("```json", "").replace("```", "").strip()
    start = text.find("[")
    if start >= 0:
        return _bracketed(text[start:])
    marked = [match[1] for line in text.splitlines() if (match := _MARKED.match(line))]
    if marked:
        names = [_EXPLANATION.split(line, maxsplit=1)[0] for line in marked]
        return [name for line in names for name in line.split(",")]
    head, colon, tail = text.partition(":")
    if colon and tail.strip() and "," not in head:
        text = tail
    quoted = _quoted(text)
    return quoted or _SEPARATOR.split(text)


def _bracketed(text: str) -> list[str]:
    """The items of a list that starts ``text``, and may lack its end."""
    end = text.find("]")
    inside = text[1:] if end < 0 else text[1:end]
    try:
        items = json.loads(f"[{inside}]")
    except (ValueError, RecursionError):
        return _quoted(inside) or _SEPARATOR.split(inside)
    return [item for item in items if isinstance(item, str)]


def _quoted(text: str) -> list[str]:
    return [next(group for group in match.groups() if group is not None) for match in _QUOTED.finditer(text)]


def _clean(item: str) -> str | None:
    """The name in ``item``: printable, without quotes, marks and article; None where it is none."""
    name = "".join(character if character.isprintable() else " " for character in item)
    name = " ".join(name.split()).strip(_MARKS)
    name = re.sub(r"^(?:an?|the)\s+", "", name, flags=re.IGNORECASE).strip(_MARKS)
    if name.casefold() in _NOTHING or not any(character.isalnum() for character in name):
        return None
    if len(name) > MAX_CHARACTERS or len(name.split()) > MAX_WORDS:
        return None
    return name
