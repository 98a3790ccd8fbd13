"""Qwen2.5-VL: ``Qwen2_5_VLForConditionalGeneration``."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from torch import nn

from qts_video.adapters.base import Parts, check_class, has_features
from qts_video.adapters.joined import check_tensors, join_fields
from qts_video.adapters.vision_order import first_copies, window_order
from qts_video.dropin.layout import Layout, locate_videos
from qts_video.dropin.question import ChatMarkers, resolve_markers

# The official Qwen2 vocabulary, by which a model without a tokenizer is recognised.
_OFFICIAL_IDS = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_OFFICIAL_MARKERS = ChatMarkers(opening=((151644, 872, 198), (151644, 872)), closing=((151645,),))
_VIDEO_INPUTS = ("pixel_values_videos", "video_grid_thw")


class Qwen2_5_VL:
    """Adapter of Qwen2.5-VL: M-RoPE positions, video placeholders ``<|video_pad|>``, ChatML turns."""

    model_type = "qwen2_5_vl"
    class_name = "Qwen2_5_VLForConditionalGeneration"
    host_inputs = ("video_grid_thw",)
    # Without second_per_grid_ts, get_rope_index spaces the temporal positions as for one second a step.
    default_seconds_per_step = 1.0
    rope_axes = 3
    positions_carry_time = True
    video_encoder = "get_video_features"
    closing_tags = 0

    def check(self, model: nn.Module) -> None:
        check_class(model, self.class_name)

    def parts(self, model: nn.Module) -> Parts:
        return Parts(base=model.model, decoder=model.model.language_model, vision=model.model.visual)

    def projector(self, model: nn.Module) -> nn.Module:
        return model.model.visual.merger

    def video_token_id(self, model: nn.Module) -> int:
        return model.config.video_token_id

    def holds_video(self, model: nn.Module, input_ids: torch.Tensor, tokenizer: Any | None) -> bool:
        return bool((input_ids == self.video_token_id(model)).any())

    def vision_token_ids(self, model: nn.Module, tokenizer: Any | None = None) -> tuple[int, ...]:
        return tuple(getattr(model.config, name) for name in _OFFICIAL_IDS)

    def needs_token_types(self, model: nn.Module) -> bool:
        return "mm_token_type_ids" in inspect.signature(type(model.model).forward).parameters

    def has_video_features(self, inputs: Mapping[str, Any]) -> bool:
        return has_features(inputs, "pixel_values_videos", "video")

    def locate(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        valid: torch.Tensor,
        inputs: Mapping[str, Any],
        tokenizer: Any | None,
    ) -> Layout:
        grid = inputs.get("video_grid_thw")
        if grid is None:
            raise ValueError(
                "input_ids hold video placeholders but video_grid_thw is missing: give the whole output of the "
                "processor to the model's forward or to its generate()"
            )
        merge = model.config.vision_config.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in grid.tolist()]
        return locate_videos(input_ids, valid, self.video_token_id(model), grids, closing_tags=self.closing_tags)

    def regroup_copies(self, model: nn.Module, inputs: dict[str, Any], layout: Layout, copies: int) -> dict[str, Any]:
        return inputs

    def vision_in_order(self, model: nn.Module, features: torch.Tensor, layout: Layout, copies: int) -> torch.Tensor:
        features = self._patches_of_tokens(model, features, layout, copies)
        vision = model.config.vision_config
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        starts = [0, *accumulate(layout.lengths)]
        order = torch.cat([window_order(grid, side) + start for grid, start in zip(layout.grids, starts, strict=False)])
        return features.index_select(0, order.argsort().to(features.device))

    def _patches_of_tokens(self, model: nn.Module, features: torch.Tensor, layout: Layout, copies: int) -> torch.Tensor:
        """[sum M, merge^2, Dv], of every sample once."""
        patches = model.config.vision_config.spatial_merge_size**2
        features = features.reshape(-1, patches, features.shape[-1])
        return first_copies(features, layout.per_sample(layout.lengths), copies)

    def video_chunks(self, model: nn.Module, arguments: Mapping[str, Any], frames: int) -> list[dict[str, Any]]:
        pixels, grid = (arguments.get(name) for name in _VIDEO_INPUTS)
        if pixels is None or grid is None or len(pixels) != int(grid.prod(1).sum()):
            raise ValueError(
                "to be encoded in chunks of frames, pixel_values_videos must have a row for every patch of "
                f"video_grid_thw, got {None if pixels is None else list(pixels.shape)} and "
                f"{None if grid is None else grid.tolist()}"
            )
        check_tensors(arguments, *_VIDEO_INPUTS)
        grids = _cut(grid.tolist(), max(1, frames // model.config.vision_config.temporal_patch_size))
        rows = pixels.split([sum(map(math.prod, of_chunk)) for of_chunk in grids])
        return [
            {**arguments, **dict(zip(_VIDEO_INPUTS, (of_chunk, grid.new_tensor(cut)), strict=True))}
            for of_chunk, cut in zip(rows, grids, strict=True)
        ]

    def join_chunks(
        self, model: nn.Module, arguments: Mapping[str, Any], chunks: list[dict[str, Any]], outputs: list[Any]
    ) -> Any:
        join = self._join_videos(model, arguments)
        return join_fields(outputs, pooler_output=join) if isinstance(outputs[0], Mapping) else join(outputs)

    def _join_videos(self, model: nn.Module, arguments: Mapping[str, Any]) -> Callable[[Sequence], tuple]:
        """A function that makes [M, D] of every video of what the chunks have, [M', D] of every stretch of a video."""
        tokens = (arguments["video_grid_thw"].prod(1) // model.config.vision_config.spatial_merge_size**2).tolist()
        return lambda parts: torch.cat(list(chain.from_iterable(parts))).split(tokens)

    def gather_extras(self, inputs: Mapping[str, Any], sample: torch.Tensor, columns: torch.Tensor) -> dict[str, Any]:
        return {}

    def seconds_per_step(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        seconds = inputs.get("second_per_grid_ts")
        return None if seconds is None else torch.as_tensor(seconds, dtype=torch.float32).flatten()

    def chat_markers(self, model: nn.Module, tokenizer: Any | None) -> ChatMarkers | None:
        if tokenizer is not None:
            return resolve_markers(
                tokenizer, turn_start="<|im_start|>", user="user", newline="\n", turn_end="<|im_end|>"
            )
        official = all(getattr(model.config, name) == value for name, value in _OFFICIAL_IDS.items())
        return _OFFICIAL_MARKERS if official else None


def _cut(grids: list[list[int]], steps: int) -> list[list[tuple[int, int, int]]]:
    """Grids (T, H, W) of videos, cut into chunks of at most ``steps`` steps together."""
    chunks: list[list[tuple[int, int, int]]] = []
    room = 0
    for left, height, width in grids:
        while left:
            if room == 0:
                chunks.append([])
                room = steps
            taken = min(left, room)
            chunks[-1].append((taken, height, width))
            left, room = left - taken, room - taken
    return chunks
