"""A checkpoint's config and tensors, from a folder or from the hub, without loading what nobody asked for."""

import json
import re
from pathlib import Path
from typing import Any

import torch

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Checkpoint:
    """``config.json`` and safetensors, whole or in shards, of a local folder or of a hub id.

    From the hub only what is needed is fetched: first the small files, then the shards that hold the wanted tensors.

    Raises:
        FileNotFoundError: neither a folder nor a model that the hub gives, or the folder has no config.json.
    """

    def __init__(self, path_or_id: str | Path) -> None:
        self.name = str(path_or_id)
        folder = Path(path_or_id).expanduser()
        self._hub_id = None
        if not folder.is_dir():
            if not re.fullmatch(r"[\w.-]+/[\w.-]+", self.name):
                raise FileNotFoundError(f"{self.name}: no such folder")
            self._hub_id = self.name
            folder = self._fetch("*.json", "*.txt", "*.jinja")
        self.folder = folder
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{self.name}: no {CONFIG}")
        self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text())

    def names(self) -> dict[str, str]:
        """Of every tensor, the file that holds it."""
        if (self.folder / INDEX).is_file():
            return json.loads((self.folder / INDEX).read_text())["weight_map"]
        if self._hub_id is not None:
            self._fetch(SINGLE)
        if not (self.folder / SINGLE).is_file():
            raise FileNotFoundError(f"{self.name}: no {SINGLE} and no {INDEX}")
        from safetensors import safe_open

        with safe_open(self.folder / SINGLE, "pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)

    def tensors(self, prefixes: tuple[str, ...] = ("",)) -> dict[str, torch.Tensor]:
        """The tensors whose names start with one of ``prefixes``, on the CPU."""
        from safetensors import safe_open

        wanted: dict[str, list[str]] = {}
        for name, file_name in self.names().items():
            if name.startswith(prefixes):
                wanted.setdefault(file_name, []).append(name)
        if self._hub_id is not None and wanted:
            self._fetch(*wanted)
        found = {}
        for file_name, names in wanted.items():
            with safe_open(self.file(file_name), "pt") as file:
                found |= {name: file.get_tensor(name) for name in names}
        return found

    def file(self, name: str) -> Path:
        """Where a file that ``names`` names is; fetched from the hub if it is not here yet."""
        if self._hub_id is not None and not (self.folder / name).is_file():
            self._fetch(name)
        if not (self.folder / name).is_file():
            raise FileNotFoundError(f"{self.name}: {INDEX} names {name}, which is absent")
        return self.folder / name

    def _fetch(self, *patterns: str) -> Path:
        import huggingface_hub

        try:
            return Path(huggingface_hub.snapshot_download(self._hub_id, allow_patterns=list(patterns)))
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise FileNotFoundError(f"{self.name}: no such folder, and the hub does not give it: {reason}") from error
