"""``qts data check``: what is in a file of questions, and what is wrong with it."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from qts_video.data.formats import Record, RecordError
from qts_video.data.media import find_media
from qts_video.data.records import read_records
from qts_video.loading import CommandError
from qts_video.video import VideoError, read_video


def run(arguments: argparse.Namespace) -> int:
    """The findings on stdout. 1 where there is a bad record, a missing video, or one that does not decode."""
    path = Path(arguments.file)
    try:
        found = read_records(path, format=arguments.format, on_bad="skip")
    except (OSError, RecordError) as error:
        raise CommandError(str(error)) from error
    root = path.parent if arguments.media_root is None else Path(arguments.media_root).expanduser()
    media = {name: find_media(root, name) for name in dict.fromkeys(record.media for record in found.records)}
    missing = [f"{record.source}: {record.media}" for record in found.records if media[record.media] is None]
    broken = _broken([path for path in media.values() if path is not None]) if arguments.decode else []

    print(f"format    {found.format or 'unknown'}")
    print(f"questions {len(found.records):,}, about {len(media):,} videos")
    _print_answers(found.records)
    if found.records:
        longest = max(found.records, key=lambda record: len(record.question))
        print(f"longest   question: {len(longest.question):,} characters ({longest.source})")
    _print_list("repeated  ids", _repeated(found.records))
    _print_list("bad       records", [str(bad) for bad in found.bad])
    _print_list("missing   videos", missing)
    if arguments.decode:
        _print_list("broken    videos", broken)
    return 1 if found.bad or missing or broken else 0


def _broken(paths: Sequence[Path]) -> list[str]:
    """Of the videos, those of which no frame, or not every one of four, can be read: why."""
    broken = []
    for path in tqdm(paths, desc="decoding", disable=None):
        try:
            video = read_video(path, min_frames=1, max_frames=4)
        except VideoError as error:
            broken.append(str(error))
            continue
        broken += [f"{path}: {note}" for note in video.notes if note.startswith("damaged")]
    return broken


def _print_answers(records: Sequence[Record]) -> None:
    """How often each letter is right."""
    letters = Counter(record.answer for record in records if record.choices)
    if letters:
        total = letters.total()
        shares = (f"{name} {letters[name]:,} ({letters[name] / total:.1%})" for name in sorted(letters))
        print(f"answers   {', '.join(shares)}")


def _repeated(records: Sequence[Record]) -> list[str]:
    by_id: dict[str, list[str]] = {}
    for record in records:
        if record.id:
            by_id.setdefault(record.id, []).append(record.source)
    return [f"{name}: {', '.join(sources)}" for name, sources in by_id.items() if len(sources) > 1]


def _print_list(what: str, lines: Sequence[str]) -> None:
    print(f"{what}: {len(lines):,}", *(f"  {line}" for line in lines), sep="\n")
