"""Results on disk, and what a later run lost against them: in ratios to a peer, never in seconds."""

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ALLOWED = 0.15
"""Share of a ratio that may go before it counts as lost."""

REFERENCE = "eager reference"
"""Who: the op's own eager PyTorch, by ``backends.force("reference")``."""

Row = dict[str, Any]


def key(row: Row) -> tuple[str, str, str]:
    """What makes two rows of different runs the same measurement."""
    return row["op"], row["shape"], row["who"]


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; none where there is no file yet."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def lost(stored: list[Row], rows: list[Row], allowed: float = ALLOWED) -> list[tuple[Row, float]]:
    """The rows whose peer is nearer to us (its ``ratio_to_ours`` smaller) than it was by more than ``allowed``, and
    what the ratio was. Rows without a ratio, and those that are not stored, are never lost."""
    before = {key(row): row["ratio_to_ours"] for row in stored if row["ratio_to_ours"]}
    return [
        (row, before[key(row)])
        for row in rows
        if row["ratio_to_ours"] and key(row) in before and row["ratio_to_ours"] < (1 - allowed) * before[key(row)]
    ]


def slower(rows: list[Row], allowed: float = ALLOWED) -> list[Row]:
    """The rows of an eager reference, which keeps the op's own contract, that is faster than the op by more than
    ``allowed``."""
    return [row for row in rows if row["who"] == REFERENCE and (row["ratio_to_ours"] or 1) < 1 - allowed]


def label(row: Row) -> str:
    return "  ".join(key(row))


def write_rows(
    path: Path, rows: list[Row], machine: str, versions: dict[str, str], ceilings: dict[str, float] | None = None
) -> None:
    """Put ``rows`` into a results file, in the place of the same measurements of earlier runs."""
    merged = {key(row): row for row in [*read_rows(path), *rows]}
    results = {
        "machine": machine,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": versions,
        "ceilings": ceilings or {},
        "rows": [merged[of] for of in sorted(merged)],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
