"""What differs between models: one file a model, behind one small protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from qts_video.dropin.question import ChatMarkers


@dataclass(frozen=True)
class Parts:
    """The modules of a model that the drop-in hooks."""

    base: nn.Module
    """The multimodal model: ``input_ids`` and pixels in, hidden states out."""
    decoder: nn.Module
    """The language model, which ``base`` calls with ``inputs_embeds=``."""
    vision: nn.Module
    """The vision tower, which ``base`` calls for images and for videos (timed, never changed)."""


class Adapter(Protocol):
    """Everything the drop-in needs to know about one model."""

    model_type: str
    """``config.model_type`` of the models it serves."""
    host_inputs: tuple[str, ...]
    """Names of the integer inputs that ``grids`` reads: brought to the host with the prompt, in one
    transfer."""
    default_seconds_per_step: float
    """What the model itself takes a step of the temporal grid to last, in seconds, where it is not told."""

    def check(self, model: nn.Module) -> None:
        """Raise TypeError unless ``model`` is of the class that this adapter knows."""
        ...

    def parts(self, model: nn.Module) -> Parts:
        """The modules to hook."""
        ...

    def video_token_id(self, model: nn.Module) -> int:
        """The placeholder that stands in ``input_ids`` for every token of a video."""
        ...

    def vision_token_ids(self, model: nn.Module) -> tuple[int, ...]:
        """Ids that mark vision in ``input_ids``, and so are never the text of a question."""
        ...

    def needs_token_types(self, model: nn.Module) -> bool:
        """Whether the model, to give video tokens their positions, must be given ``mm_token_type_ids``."""
        ...

    def has_video_features(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a forward call was given videos, as pixels or encoded."""
        ...

    def grids(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> list[tuple[int, int, int]]:
        """(time steps, rows, columns) of each video's tokens after the merger, in the order of the
        placeholders.

        ``inputs`` holds those of ``host_inputs`` that the call was given, on the CPU. A video has time steps
        * rows * columns tokens. Raises ValueError where an input that is needed is missing.
        """
        ...

    def seconds_per_step(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Seconds between two steps of each video's temporal grid [V] float32, or None where the call does
        not say."""
        ...

    def chat_markers(self, model: nn.Module, tokenizer: Any | None) -> ChatMarkers | None:
        """The chat markers' ids by the tokenizer, or, without one, those of the official vocabulary where the
        model has it.

        None where there is no tokenizer and the vocabulary is another. Raises ValueError where the tokenizer
        lacks a marker.
        """
        ...
