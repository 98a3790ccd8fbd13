"""Questions about videos with their answers: read from files, made into model inputs."""

from .collator import Collator
from .sample import Sample

__all__ = ["Collator", "Sample"]
