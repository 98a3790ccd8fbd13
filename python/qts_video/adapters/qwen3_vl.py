"""Qwen3-VL: ``Qwen3VLForConditionalGeneration``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qts_video.adapters.joined import join_fields
from qts_video.adapters.qwen2_5_vl import Qwen2_5_VL
from qts_video.dropin.layout import Layout

_TIME_LABEL = re.compile(r"<(\d+(?:\.\d+)?) seconds>$")
_LONGEST_LABEL = 16  # tokens: a digit is one of its own


class Qwen3_VL(Qwen2_5_VL):
    """Adapter of Qwen3-VL. Like Qwen2.5-VL, but every time step of a video is a block of its own in the prompt,
    ``<0.5 seconds><|vision_start|>...<|vision_end|>``: the time is in the text, not in the positions, and is read from
    there where ``attach`` was given a tokenizer. Features of the first layers of the vision tower are added to the
    hidden states behind the decoder's first layers (DeepStack); they shrink with the tokens.
    """

    model_type = "qwen3_vl"
    class_name = "Qwen3VLForConditionalGeneration"
    # The processor samples 2 frames a second, and a step is 2 frames.
    default_seconds_per_step = 1.0
    positions_carry_time = False
    closing_tags = 1

    def locate(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        valid: torch.Tensor,
        inputs: Mapping[str, Any],
        tokenizer: Any | None,
    ) -> Layout:
        layout = super().locate(model, input_ids, valid, inputs, tokenizer)
        return layout if tokenizer is None else _read_time_labels(layout, tokenizer)

    def vision_in_order(self, model: nn.Module, features: torch.Tensor, layout: Layout, copies: int) -> torch.Tensor:
        return self._patches_of_tokens(model, features, layout, copies)

    def join_chunks(
        self, model: nn.Module, arguments: Mapping[str, Any], chunks: list[dict[str, Any]], outputs: list[Any]
    ) -> Any:
        join = self._join_videos(model, arguments)

        def join_layers(parts: Sequence) -> list:
            """Of every layer of the tower, [sum M, D]; by videos on newer versions."""
            layers = zip(*parts, strict=True)
            return [torch.cat(layer) if isinstance(layer[0], torch.Tensor) else join(layer) for layer in layers]

        if isinstance(outputs[0], Mapping):
            return join_fields(outputs, pooler_output=join, deepstack_features=join_layers)
        embeds, deepstack = zip(*outputs, strict=True)
        return join(embeds), join_layers(deepstack)

    def gather_extras(self, inputs: Mapping[str, Any], sample: torch.Tensor, columns: torch.Tensor) -> dict[str, Any]:
        mask = inputs.get("visual_pos_masks")
        if mask is None:
            return {}
        rows = sample.unsqueeze(1) * mask.shape[1] + columns.clamp(min=0)
        gathered = mask.flatten()[rows] & (columns >= 0)
        # Indexing by a mask waits for the device; so does the decoder, which adds the features by this very mask
        # behind each of its first layers.
        features = (mask.flatten().cumsum(0) - 1)[rows][gathered]
        embeds = inputs["deepstack_visual_embeds"]
        return {
            "visual_pos_masks": gathered,
            "deepstack_visual_embeds": [of_layer.index_select(0, features.to(of_layer.device)) for of_layer in embeds],
        }

    def seconds_per_step(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        return None


def _read_time_labels(layout: Layout, tokenizer: Any) -> Layout:
    """The layout with the times that the prompt gives the steps, and with first steps that start at their label; as it
    was where a step has none."""
    times, frame_spans = [], []
    for rows, (steps, _, _), sample, spans in zip(
        layout.rows.split(layout.lengths), layout.grids, layout.sample, layout.frame_spans, strict=True
    ):
        ids = layout.input_ids[sample].tolist()
        tags = (rows.view(steps, -1)[:, 0] % layout.columns - 1).tolist()  # the <|vision_start|> of every step
        candidates = range(tags[0] - 1, max(tags[0] - _LONGEST_LABEL, 0) - 1, -1)
        first = next((start for start in candidates if _seconds(tokenizer, ids[start : tags[0]]) is not None), None)
        if first is None:
            return layout
        spans = torch.cat([torch.tensor([[first, int(spans[0, 1])]]), spans[1:]])
        seconds = [_seconds(tokenizer, ids[start:tag]) for start, tag in zip(spans[:, 0].tolist(), tags, strict=True)]
        if None in seconds:
            return layout
        times.append(torch.tensor(seconds))
        frame_spans.append(spans)
    return replace(layout, step_seconds=times, frame_spans=frame_spans)


def _seconds(tokenizer: Any, ids: list[int]) -> float | None:
    """The time in a label, which ``ids`` end with."""
    label = _TIME_LABEL.search(tokenizer.decode(ids))
    return None if label is None else float(label[1])
