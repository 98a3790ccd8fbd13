"""A teacher's scores on disk: a file a sample, written once, read in every epoch."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from tqdm import tqdm

from qts_video.data import Sample
from qts_video.train.teacher import Teacher

SETTINGS = "settings.json"
_FORMAT = 1

Grids = list[tuple[int, int, int]]
"""(time steps, rows, columns) of each video of a sample."""


class ScoreFolder:
    """Scores that ``dump_scores`` wrote: ``settings.json``, and of each sample ``<key>.safetensors`` with "scores"
    [M] float32. The key is a hash of the frames, their times and the prompt, so files may be renamed and reordered.

    Raises FileNotFoundError where ``folder`` has no ``settings.json``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / SETTINGS).is_file():
            raise FileNotFoundError(f"{folder}: no {SETTINGS}; make a folder of scores with dump_scores")
        self.settings: dict[str, Any] = json.loads((self.folder / SETTINGS).read_text())

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError, with what differs, unless the scores were made with ``settings`` (``Teacher.settings``)."""
        wanted = {"format": _FORMAT, **settings}
        names = sorted(set(wanted) | set(self.settings))
        other = [
            f"{name} {self.settings.get(name)} (expected {wanted.get(name)})"
            for name in names
            if self.settings.get(name) != wanted.get(name)
        ]
        if other:
            raise ValueError(f"{self.folder} holds scores made with other settings: {', '.join(other)}")

    def path(self, sample: Sample) -> Path:
        """The file of ``sample``, there or not."""
        return self.folder / f"{sample_key(sample)}.safetensors"

    def read(self, sample: Sample) -> tuple[torch.Tensor, Grids]:
        """Scores [M] float32 on the CPU, video after video, and the videos' grids.

        Raises:
            FileNotFoundError: there are none of this sample.
            ValueError: the file is damaged, or not of this folder.
        """
        path = self.path(sample)
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} has no scores of {sample.name}: run dump_scores on it")
        try:
            with safe_open(path, "pt") as file:
                metadata, scores = file.metadata() or {}, file.get_tensor("scores")
        except SafetensorError as error:
            raise ValueError(f"{path}: damaged: {error}") from error
        made = json.loads(metadata.get("settings", "null"))
        if made != self.settings:
            raise ValueError(f"{path}: made with {made}, and {SETTINGS} says {self.settings}")
        grids = [tuple(grid) for grid in json.loads(metadata["grids"])]
        tokens = sum(t * h * w for t, h, w in grids)
        if scores.dtype != torch.float32 or scores.shape != (tokens,) or not bool(scores.isfinite().all()):
            raise ValueError(
                f"{path}: expected {tokens} finite float32 scores, got {scores.dtype} {list(scores.shape)}"
            )
        return scores, grids

    def has(self, sample: Sample) -> bool:
        """Whether there are valid scores of ``sample``."""
        try:
            self.read(sample)
        except (FileNotFoundError, ValueError):
            return False
        return True


class LiteCollator:
    """What ``collator`` makes of samples, and their teacher's scores: "teacher_scores" [sum M] float32, sample after
    sample, and "teacher_grids" [V, 3] int64, which the trainer compares with the prompt's.

    Args:
        collator: samples -> the model's inputs, without answers (``qts_video.data.Collator(processor, train=False)``):
            all text behind a video asks for its tokens, and a user's prompt has no answer.
        scores: where to read.
    """

    def __init__(self, collator: Callable[[Sequence[Sample]], Mapping[str, Any]], scores: ScoreFolder) -> None:
        self.collator, self.scores = collator, scores

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        found = [self.scores.read(sample) for sample in samples]
        return {
            **self.collator(samples),
            "teacher_scores": torch.cat([scores for scores, _ in found]),
            "teacher_grids": torch.tensor([grid for _, grids in found for grid in grids]),
        }


def dump_scores(
    model: nn.Module | Teacher,
    collator: Callable[[Sequence[Sample]], Mapping[str, Any]],
    dataset: Sequence[Sample],
    folder: str | Path,
    *,
    progress: bool = True,
    **options: Any,
) -> ScoreFolder:
    """Write the teacher's scores of every sample. Once begun it can be stopped and run again at any point: files
    appear whole, and a sample that has a valid one is skipped. Processes may share the folder.

    Args:
        model: the big model, or a ``Teacher``.
        collator: as for ``LiteCollator``.
        dataset: the samples.
        folder: made where it is not there.
        progress: a bar on stderr, if that is a terminal.
        options: of ``Teacher``: ``layer``, ``tokenizer``, ``reduce``, ``query``, ``frames_per_set``.

    Raises:
        ValueError: the folder holds scores made with other settings, or something else; a score is not finite; or as
            ``Teacher`` says.
    """
    teacher = model if isinstance(model, Teacher) else Teacher(model, **options)
    scores = _open_folder(Path(folder), teacher.settings(getattr(collator, "processor", None)))
    for number in tqdm(range(len(dataset)), desc="teacher scores", disable=None if progress else True):
        sample = dataset[number]
        if scores.has(sample):
            continue
        videos = teacher.prefill(collator([sample]))
        found = teacher.scores(videos).float().cpu()
        if not bool(found.isfinite().all()):
            raise ValueError(f"{sample.name}: layer {teacher.layer} gives scores that are not finite")
        metadata = {
            "sample": sample.id,
            "grids": json.dumps(videos.grids),
            "settings": json.dumps(scores.settings),
        }
        _write(scores.path(sample), save({"scores": found}, metadata))
    return scores


def sample_key(sample: Sample) -> str:
    """32 hexadecimal digits: a hash of the sampled frames, their times and the prompt."""
    frames = sample.video.frames
    described = json.dumps([sample.prompt, list(sample.video.seconds), list(frames.shape), str(frames.dtype)])
    digest = hashlib.blake2b(described.encode(), digest_size=16)
    digest.update(frames.contiguous().numpy())
    return digest.hexdigest()


def _open_folder(folder: Path, settings: dict[str, Any]) -> ScoreFolder:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SETTINGS).is_file():
        if any(not path.name.startswith(".") for path in folder.iterdir()):  # another process may be writing them
            raise ValueError(f"{folder} is not empty, and no folder of scores: it has no {SETTINGS}")
        _write(folder / SETTINGS, json.dumps({"format": _FORMAT, **settings}, indent=2).encode())
    scores = ScoreFolder(folder)
    scores.check(settings)
    return scores


def _write(path: Path, content: bytes) -> None:
    """All of the file, or nothing."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
