"""Files of records: one JSON object a line, or one JSON array."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qts_video.data.formats import FORMATS, Record, RecordError, detect

SHOWN = 20
"""Most bad records that an error lists."""


@dataclass(frozen=True)
class Bad:
    """A record that can't be used."""

    source: str
    """file:line"""
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


@dataclass
class Records:
    """What is in a file."""

    format: str | None = None
    """"vscq", "vqa" or "llava_video_178k"; None where no record says."""
    records: list[Record] = field(default_factory=list)
    bad: list[Bad] = field(default_factory=list)


def read_records(path: str | Path, *, format: str = "auto", on_bad: str = "raise") -> Records:
    """The questions in a file of records: JSON Lines, or one JSON array (then "line" means the record's number).

    Args:
        path: the file.
        format: one of ``FORMATS``, or "auto": the first record decides by its fields, and all others must be of the
            same format.
        on_bad: "raise", or "skip": bad records are left out and listed in ``bad``.

    Raises:
        RecordError: with "raise", a record that can't be used, or several: each with file, line and reason; a file
            without any record.
        OSError: the file can't be read.
        ValueError: an unknown ``format`` or ``on_bad``.
    """
    if format != "auto" and format not in FORMATS:
        raise ValueError(f"format must be auto, {', '.join(FORMATS)}, got {format!r}")
    if on_bad not in ("raise", "skip"):
        raise ValueError(f'on_bad must be "raise" or "skip", got {on_bad!r}')
    found = Records(None if format == "auto" else format)
    decided_by = ""
    for source, read in _objects(Path(path)):
        try:
            if isinstance(read, RecordError):
                raise read
            kind = detect(read) if format == "auto" else format
            parsed = FORMATS[kind](read)
            if found.format is None:
                found.format, decided_by = kind, source
            if kind != found.format:
                raise RecordError(f"expected a record of format {found.format}, as {decided_by} is, got one of {kind}")
        except RecordError as error:
            found.bad.append(Bad(source, str(error)))
            continue
        first = len(found.records)
        found.records += [replace(one, source=source, number=number) for number, one in enumerate(parsed, first)]
    if on_bad == "raise" and found.bad:
        raise RecordError(listed(found.bad))
    if not found.records and not found.bad:
        raise RecordError(f"{path}: expected records, got an empty file")
    return found


def listed(lines: Sequence[object], most: int = SHOWN) -> str:
    """One a line, the first ``most`` of them."""
    rest = [] if len(lines) <= most else [f"... and {len(lines) - most} more"]
    return "\n".join([*map(str, lines[:most]), *rest])


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    """(file:line, the object there or what is wrong with it)."""
    data = path.read_bytes()
    if data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _array(path, data)
        return
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield f"{path}:{number}", _object(line)


def _array(path: Path, data: bytes) -> Iterator[tuple[str, dict[str, Any] | RecordError]]:
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:
        yield f"{path}:{getattr(error, 'lineno', 1)}", RecordError(f"expected a JSON array ({error})")
        return
    for number, value in enumerate(values, 1):
        yield f"{path}:{number}", value if isinstance(value, dict) else _not_an_object(value)


def _object(line: bytes) -> dict[str, Any] | RecordError:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError is one
        return RecordError(f"expected a JSON object ({error})")
    return value if isinstance(value, dict) else _not_an_object(value)


def _not_an_object(value: Any) -> RecordError:
    return RecordError(f"expected a JSON object, got {type(value).__name__}")
