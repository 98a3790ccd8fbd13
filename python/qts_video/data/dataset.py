"""A file of questions about videos as a torch dataset."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from qts_video.data.formats import Record, RecordError
from qts_video.data.media import SAMPLINGS, find_media, places
from qts_video.data.records import Bad, listed, read_records
from qts_video.data.sample import Sample
from qts_video.video import VideoError, read_video


class VideoQADataset(Dataset):
    """Questions about videos with their answers, by index; a video is read when its sample is asked for.

    Args:
        path: a file of records (docs/data.md), or several, each with a format of its own.
        media_root: folder from which records name their videos. None: that of each file.
        format, on_bad: see ``read_records``.
        sampling: "uniform": evenly spaced moments, from the first on (as ``qts ask`` samples); "middle": the middle of
            as many equal stretches; "random": a moment of each stretch, drawn from ``seed``, the epoch and the sample.
        fps, min_frames, max_frames, max_pixels, total_pixels, frame_rate, reader: see ``read_video``.
        seed: of "random".

    Records whose videos are missing are left out with a warning that counts and lists them; ``missing`` holds them,
    and ``bad`` the records that ``on_bad="skip"`` left out. May be pickled for the workers of a DataLoader.

    Raises:
        RecordError: see ``read_records``; or no record has its video.
        OSError, ValueError: a file that can't be read, an argument out of range.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        media_root: str | Path | None = None,
        format: str = "auto",
        on_bad: str = "raise",
        sampling: str = "uniform",
        fps: float = 2.0,
        min_frames: int = 4,
        max_frames: int = 64,
        max_pixels: int | None = None,
        total_pixels: int | None = None,
        frame_rate: float | None = None,
        reader: str = "auto",
        seed: int = 0,
    ) -> None:
        if sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
        self.sampling, self.seed = sampling, seed
        self._reading = {
            "fps": fps,
            "min_frames": min_frames,
            "max_frames": max_frames,
            "max_pixels": max_pixels,
            "total_pixels": total_pixels,
            "frame_rate": frame_rate,
            "reader": reader,
        }
        self.records: list[Record] = []
        self.formats: list[str | None] = []
        """Of each file."""
        self.bad: list[Bad] = []
        self.missing: list[Record] = []
        self._media: list[Path] = []
        # Shared with the workers of a DataLoader, so that those who live on learn of a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        for file in [path] if isinstance(path, str | Path) else path:
            found = read_records(file, format=format, on_bad=on_bad)
            self.formats.append(found.format)
            self.bad += found.bad
            root = Path(file).parent if media_root is None else Path(media_root).expanduser()
            for record in found.records:
                media = find_media(root, record.media)
                if media is None:
                    self.missing.append(record)
                else:
                    self.records.append(record)
                    self._media.append(media)
        self._report(path)

    def _report(self, path: str | Path | Sequence[str | Path]) -> None:
        total = len(self.records) + len(self.missing)
        lines = [f"{record.source}: {record.media}" for record in self.missing]
        message = f"{len(lines)} of {total} records have no video, and are left out:\n{listed(lines)}"
        if not self.records:
            raise RecordError(message if lines else f"{path}: no record can be used:\n{listed(self.bad)}")
        if self.bad:
            warnings.warn(f"{len(self.bad)} bad records are left out:\n{listed(self.bad)}", stacklevel=3)
        if lines:
            warnings.warn(message, stacklevel=3)

    @property
    def epoch(self) -> int:
        """What "random" sampling draws from, with the seed and the sample."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loaders, and so by Trainer, at the start of every epoch."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        """Raises VideoError, with the record's file and line, where the video can't be read."""
        record = self.records[index]
        within = places(self.sampling, self.seed, self.epoch, f"{record.number}:{record.media}")
        try:
            video = read_video(self._media[index], within_step=within, **self._reading)
        except VideoError as error:
            raise VideoError(f"{record.source}: {error}") from error
        return Sample(video, record.question, record.answer, record.id, record.choices, record.source)
