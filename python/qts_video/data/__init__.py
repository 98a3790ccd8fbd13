"""Questions about videos with their answers: read from files, made into model inputs."""

from .collator import Collator
from .dataset import VideoQADataset
from .formats import Record, RecordError
from .records import Bad, Records, read_records
from .sample import Sample

__all__ = ["Bad", "Collator", "Record", "RecordError", "Records", "Sample", "VideoQADataset", "read_records"]
