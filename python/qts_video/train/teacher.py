"""The big model as a teacher: its attention at the reference layer says how relevant each video token is."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from qts_kernels import Selection
from qts_video.adapters import find_adapter
from qts_video.attach import attach
from qts_video.flexselect.defaults import default_layer
from qts_video.flexselect.early_exit import check_layers
from qts_video.flexselect.relevance import QUERIES, REDUCTIONS, relevance_by_layer
from qts_video.methods.base import Videos
from qts_video.newlines import newline_layout

_NOT_FOR_THE_MODEL = ("labels", "seconds_per_step")
_SAMPLED = 64


class Teacher:
    """A frozen model that scores video tokens, as training-free ``FlexSelect`` does (arXiv 2506.00993).

    ``model`` is put in eval mode and loses its gradients (``requires_grad_(False)``).

    Args:
        model: one that ``attach`` knows.
        layer: the reference layer, counted from 0. None: the published one of the model.
        tokenizer: the model's tokenizer or processor: see ``attach``.
        reduce, query, frames_per_set: of ``FlexSelect``. The student scores by the same, and so must
            ``FlexSelect.lite`` when it is used.

    Raises:
        TypeError: the model is not known.
        ValueError: no published layer, a layer that can't be used, or an unknown ``reduce`` or ``query``.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: int | None = None,
        *,
        tokenizer: Any | None = None,
        reduce: str = "max",
        query: str = "prompt",
        frames_per_set: int = 64,
    ) -> None:
        decoder = find_adapter(model).parts(model).decoder
        layer = default_layer(model, decoder) if layer is None else layer
        check_layers(decoder, [layer])
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        if query not in QUERIES:
            raise ValueError(f"query must be one of {', '.join(QUERIES)}, got {query!r}")
        self.model = model.requires_grad_(False).eval()
        self.layer = layer
        self.tokenizer = tokenizer
        self.options = {"reduce": reduce, "query": query, "frames_per_set": frames_per_set}

    @torch.no_grad()
    def prefill(self, batch: Mapping[str, Any]) -> Videos:
        """The videos of a prompt, as a method that reads the vision tower's features is given them; the model's
        language model does not run.

        Args:
            batch: the model's inputs, on any device and with pixels in any floating-point dtype; "labels" and
                "seconds_per_step" are left out.

        Raises:
            ValueError: there is no video, or not in every sample.
        """
        inputs = {name: value for name, value in batch.items() if name not in _NOT_FOR_THE_MODEL}
        position = getattr(self.model.config, "mm_newline_position", None)
        taken = _Take()
        with ExitStack() as stack:
            if position in ("grid", "frame"):  # a LLaVA-Video: its class does not know of them
                inputs = stack.enter_context(newline_layout(self.model, position)).prepare(inputs)
            inputs = {name: self._move(name, value) for name, value in inputs.items()}
            stack.enter_context(attach(self.model, taken, tokenizer=self.tokenizer))
            stack.enter_context(suppress(_Taken))
            self.model(**inputs)
        samples = len(inputs["input_ids"])
        without = sorted(set(range(samples)) - set(taken.videos.sample if taken.videos else ()))
        if without:
            raise ValueError(f"every sample must have a video, and of {samples} these have none: {without}")
        return taken.videos

    def scores(self, videos: Videos) -> torch.Tensor:
        """Relevance of every token of ``videos``, of ``prefill``: [sum M] float32 (float64 from a float64 model),
        without gradients."""
        return relevance_by_layer(videos, [self.layer], **self.options)[self.layer]

    def settings(self, processor: Any | None = None) -> dict[str, Any]:
        """What scores depend on beside the sample: the model's weights (a few of every tensor), the layer, the
        options, and how ``processor`` makes inputs of frames and text."""
        return {
            "model": fingerprint(self.model),
            "processor": None if processor is None else _processor_fingerprint(processor),
            "layer": self.layer,
            **self.options,
        }

    def _move(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        dtype = self.model.dtype if name.startswith("pixel_values") else None
        return value.to(self.model.device, dtype)


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that differ for models whose tensors have other names, shapes, dtypes or values, of which
    a few of every tensor are read."""
    digest = hashlib.blake2b(model.config.model_type.encode(), digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED)]
        digest.update(some.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _processor_fingerprint(processor: Any) -> str:
    text = json.dumps([processor.chat_template, processor.video_processor.to_json_string()])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class _Taken(Exception):
    """Leaves the model behind its vision tower."""


class _Take:
    """A selector that takes what it is given, and leaves."""

    name, needs_question, needs_vision = "teacher", False, True

    def __init__(self) -> None:
        self.videos: Videos | None = None

    def select(self, videos: Videos) -> Selection:
        self.videos = videos
        raise _Taken
