"""Relevance of a prompt in several layers at once."""

from collections.abc import Sequence
from typing import Any

import torch

from qts_kernels import Selection
from qts_video.adapters import find_adapter
from qts_video.methods.base import Videos


class Probe:
    """A selector that keeps everything and notes the relevance of every token in each of ``layers``, as ``FlexSelect``
    computes it, in one pass through the model.

    Args:
        layers: of the language model, counted from 0.
        **options: ``reduce``, ``query`` and ``frames_per_set`` of ``FlexSelect``.
    """

    name = "probe"
    needs_question = False

    def __init__(self, layers: Sequence[int], **options: Any) -> None:
        self.layers = list(layers)
        self.options = options
        self.relevance: dict[int, torch.Tensor] = {}
        """Of each layer, [sum M] float32 on the CPU: of the last prefill."""

    def select(self, videos: Videos) -> Selection:
        from qts_video.flexselect.relevance import relevance_by_layer

        found = relevance_by_layer(videos, self.layers, **self.options)
        self.relevance = {layer: scores.float().cpu() for layer, scores in found.items()}
        lengths = torch.tensor(videos.lengths, device=videos.tokens.device)
        indices = torch.arange(len(videos.tokens), device=videos.tokens.device)
        return Selection(indices=indices, cu_seqlens=videos.cu_seqlens, n=lengths)

    def __str__(self) -> str:
        return "".join(f", {name.replace('_', ' ')} {value}" for name, value in self.options.items())


def number_of_layers(model: torch.nn.Module) -> int:
    return len(find_adapter(model).parts(model).decoder.layers)
