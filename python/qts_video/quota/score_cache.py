"""Frame scores on disk: one small JSON file for each video, prompt and model."""

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

_FORMAT = 1
_SAMPLES = 64


def model_fingerprint(model: nn.Module) -> str:
    """What tells ``model`` from another: its class and config, and the name, shape, dtype and ``_SAMPLES`` values,
    evenly spread, of every parameter.

    A change that misses all samples of all parameters is not seen.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    parameters = dict(model.named_parameters())
    digest = _digest(
        type(model).__name__,
        json.dumps(config, sort_keys=True, default=str),
        repr([(name, str(p.dtype), tuple(p.shape)) for name, p in parameters.items()]),
    )
    samples = [p.detach().flatten()[:: max(1, p.numel() // _SAMPLES)][:_SAMPLES] for p in parameters.values()]
    for device in sorted({sample.device for sample in samples}, key=str):  # one copy from each device
        digest.update(torch.cat([s.double() for s in samples if s.device == device]).cpu().numpy())
    return digest.hexdigest()


def score_key(settings: dict[str, Any], pictures: Sequence[torch.Tensor]) -> str:
    """Of what the scores depend on: ``settings``, which JSON can hold, and pictures [3, H, W] uint8 on the CPU."""
    digest = _digest(str(_FORMAT), json.dumps(settings, sort_keys=True))
    for picture in pictures:
        digest.update(repr(tuple(picture.shape)).encode())
        digest.update(picture.contiguous().numpy())
    return digest.hexdigest()


class ScoreCache:
    """Scores by key, in a folder of their own. Files are written at once or not at all, so that several processes may
    share it.

    Raises OSError where the folder can't be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def get(self, key: str, number: int) -> torch.Tensor | None:
        """[number] float32; None where there are none. A file that can't be read warns, and counts as none."""
        path = self.path(key)
        try:
            scores = json.loads(path.read_bytes())["scores"]
            if len(scores) != number or not all(_is_score(score) for score in scores):
                raise ValueError(f"expected {number} scores between 0 and 1")
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"{path} is damaged ({error}): its frames are scored again", stacklevel=2)
            return None
        return torch.tensor(scores, dtype=torch.float32)

    def put(self, key: str, scores: torch.Tensor, about: dict[str, Any]) -> None:
        """Keep ``scores`` [F] float32, exactly. ``about`` is for people who open the file."""
        handle, name = tempfile.mkstemp(suffix=".tmp", dir=self.folder)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({**about, "scores": scores.tolist()}, file)
            Path(name).replace(self.path(key))
        finally:
            Path(name).unlink(missing_ok=True)


def _digest(*parts: str) -> Any:
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest


def _is_score(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and 0 <= value <= 1
