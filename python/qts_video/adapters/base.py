"""What differs between models: one file a model, behind one small protocol."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from qts_video.dropin.layout import Layout
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
    generator: nn.Module | None = None
    """The language model with its head, where the model's generate() embeds the prompt by itself and calls that of the
    language model with ``inputs_embeds=``; None where the model's generate() is transformers' own."""


def check_class(model: nn.Module, class_name: str) -> None:
    """Raise TypeError unless ``model`` is of transformers' class of that name."""
    import transformers

    if not isinstance(model, getattr(transformers, class_name)):
        raise TypeError(
            f"expected a {class_name}, got {type(model).__name__} "
            "(of a wrapped model give the model inside, e.g. peft's get_base_model())"
        )


def has_features(inputs: Mapping[str, Any], pixels: str, modality: str) -> bool:
    """Whether a forward call was given ``pixels``, or a ``modality`` that was encoded ahead."""
    encoded = inputs.get("mm_encoder_outputs") or {}  # what generate() passes on since transformers 5.18
    return inputs.get(pixels) is not None or encoded.get(modality) is not None


class Adapter(Protocol):
    """Everything the drop-in needs to know about one model."""

    model_type: str
    """``config.model_type`` of the models it serves."""
    host_inputs: tuple[str, ...]
    """Names of the integer inputs that ``grids`` reads: brought to the host with the prompt, in one
    transfer."""
    default_seconds_per_step: float
    """What the model itself takes a step of the temporal grid to last, in seconds, where it is not told."""
    rope_axes: int
    """Axes of the decoder's rotary positions: 1, or 3 (time, height, width) for M-RoPE."""
    positions_carry_time: bool
    """Whether the positions of a video's tokens say when they are, in absolute time, so that gaps between frames
    must not be closed."""
    video_encoder: str
    """The method of ``parts().base`` that encodes videos."""

    def check(self, model: nn.Module) -> None:
        """Raise TypeError unless ``model`` is of the class that this adapter knows."""
        ...

    def parts(self, model: nn.Module) -> Parts:
        """The modules to hook."""
        ...

    def projector(self, model: nn.Module) -> nn.Module:
        """The module between the vision tower and the language model: its input are the vision features."""
        ...

    def video_token_id(self, model: nn.Module) -> int:
        """The placeholder that stands in ``input_ids`` for every token of a video."""
        ...

    def holds_video(self, model: nn.Module, input_ids: torch.Tensor, tokenizer: Any | None) -> bool:
        """Whether a prompt [B, L] holds a video."""
        ...

    def vision_token_ids(self, model: nn.Module, tokenizer: Any | None = None) -> tuple[int, ...]:
        """Ids that mark vision in ``input_ids``, and so are never the text of a question."""
        ...

    def needs_token_types(self, model: nn.Module) -> bool:
        """Whether the model, to give video tokens their positions, must be given ``mm_token_type_ids``."""
        ...

    def has_video_features(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a forward call was given videos, as pixels or encoded."""
        ...

    def locate(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        valid: torch.Tensor,
        inputs: Mapping[str, Any],
        tokenizer: Any | None,
    ) -> Layout:
        """Where the videos of a prompt are.

        Args:
            model: the model.
            input_ids: [B, L] int64 on the CPU.
            valid: [B, L] bool on the CPU, false where the prompt is padded.
            inputs: what the model was called with, by name; those of ``host_inputs`` are on the CPU, others
                must not be read but for their shapes.
            tokenizer: the one given to ``attach``.

        Returns:
            The layout; without a video where the placeholders are all of images.

        Raises:
            ValueError: an input that is needed is missing, or does not fit the placeholders.
        """
        ...

    def regroup_copies(self, model: nn.Module, inputs: dict[str, Any], layout: Layout, copies: int) -> dict[str, Any]:
        """What the model is called with, for samples that generate() repeated ``copies`` times each, with pixels in
        the order of the placeholders: some versions repeat images (a a b b) where a sample holds several (a b a b).
        """
        ...

    def vision_in_order(self, model: nn.Module, features: torch.Tensor, layout: Layout, copies: int) -> torch.Tensor:
        """What went into the projector while ``video_encoder`` ran, in the order of the placeholders.

        Args:
            model: the model.
            features: the projector's input, as it came.
            layout: of the prefill.
            copies: how often generate() repeated every sample; ``features`` may hold them or not.

        Returns:
            Every sample once. Qwen: [sum M, merge^2, Dv], the patches of each token. LLaVA: [sum frames, patches, Dv].
            InternVL: [tiles, tokens, 4 Dv], of all tiles of the prompts, images too.
        """
        ...

    def video_chunks(self, model: nn.Module, arguments: Mapping[str, Any], frames: int) -> list[dict[str, Any]]:
        """What ``video_encoder`` is called with to encode at most ``frames`` frames at a time.

        Args:
            model: the model.
            arguments: of a call of ``video_encoder``, by name, in the order of its signature.
            frames: at least 1, of all videos of the call together. LLaVA: frames. Qwen: frames as the film has them,
                ``temporal_patch_size`` (2) in a step of the grid; a chunk has at least one step. InternVL: tiles, those
                of images too.

        Returns:
            The arguments of every chunk, in the order of the frames; a chunk may go over the end of a video.

        Raises:
            ValueError: the pixels are missing or of another shape, or there is another tensor that spans all frames.
        """
        ...

    def join_chunks(
        self, model: nn.Module, arguments: Mapping[str, Any], chunks: list[dict[str, Any]], outputs: list[Any]
    ) -> Any:
        """What ``video_encoder`` gives for ``arguments``, of the type and the shapes that it gives itself.

        Args:
            model: the model.
            arguments: given to ``video_chunks``.
            chunks: what it returned.
            outputs: of ``video_encoder`` for each chunk, with ``return_dict=True`` where it knows of that; emptied.
        """
        ...

    def gather_extras(self, inputs: Mapping[str, Any], sample: torch.Tensor, columns: torch.Tensor) -> dict[str, Any]:
        """What this model passes to its decoder a column besides embeddings, positions and masks, for other columns.

        Args:
            inputs: the decoder's keyword arguments for a whole prefill.
            sample: [R] int64, rows of its batch.
            columns: [R, K] int64 columns of those rows; -1 in padding.

        Returns:
            The arguments that change, by name; empty for most models.
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
