"""The folder of an evaluation: what it was asked for, and one line for every sample that is done."""

import json
from pathlib import Path
from typing import Any

SETTINGS, PREDICTIONS, METRICS = "settings.json", "predictions.jsonl", "metrics.json"


class Results:
    """The results of one evaluation in a folder, which another run with the same settings goes on with.

    Args:
        folder: made where it is absent.
        settings: what the predictions depend on; JSON values.

    Raises:
        ValueError: the folder holds the predictions of other settings, or something else.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._path = self.folder / PREDICTIONS
        written = self.folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if written.is_file():
            _check_same(self.folder, json.loads(written.read_text()), settings)
        elif any(self.folder.iterdir()):
            raise ValueError(f"output {self.folder}: expected an empty folder or one of qts eval, with {SETTINGS}")
        else:
            written.write_text(json.dumps(settings, indent=2) + "\n")
        self.done = self._read()
        """Lines that are there, by the number of their record."""

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self._path.exists():
            return {}
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the last line of a run that was stopped
            self._path.write_bytes(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        return {line["number"]: line for line in lines}

    def add(self, line: dict[str, Any]) -> None:
        """Write a sample's line, with its record's "number"."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.done[line["number"]] = line

    def ordered(self) -> list[dict[str, Any]]:
        """All lines, in the order of the file."""
        return [self.done[number] for number in sorted(self.done)]

    def write_metrics(self, metrics: dict[str, Any]) -> Path:
        path = self.folder / METRICS
        path.write_text(json.dumps(metrics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise ValueError(f"output {folder} holds predictions of other settings ({changes}): choose another folder")
