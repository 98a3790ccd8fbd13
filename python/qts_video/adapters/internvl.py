"""InternVL: ``InternVLForConditionalGeneration``."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qts_video.adapters.base import Parts, has_features
from qts_video.adapters.joined import first_argument, join_fields
from qts_video.adapters.numbered_frames import find_frames
from qts_video.adapters.vision_order import first_copies
from qts_video.dropin.layout import Layout, locate_videos
from qts_video.dropin.question import ChatMarkers, resolve_markers

# InternVL3's vocabulary, by which a model without a tokenizer is recognised: Qwen2's, and <img>, </img>, <IMG_CONTEXT>.
_OFFICIAL_IMAGE_TOKEN = 151667
_OFFICIAL_TAGS = (151665, 151666)
_OFFICIAL_TURN_START = 151644
_OFFICIAL_MARKERS = ChatMarkers(
    opening=((151644, 872, 198), (151644, 872)),
    closing=((151645,),),
    blanks=(198,),  # a newline follows every image
)


class InternVL:
    """Adapter of InternVL in transformers' own classes. The frames of a video are images of one tile, which the prompt
    numbers: ``Frame1: <img>...</img>``. What is a frame and what an image is told by ``find_frames``: surely with a
    tokenizer, by a guess without.
    """

    model_type = "internvl"
    host_inputs = ()
    # Neither the prompt nor the inputs say when a frame is.
    default_seconds_per_step = 1.0
    rope_axes = 1
    positions_carry_time = False
    video_encoder = "get_image_features"

    def check(self, model: nn.Module) -> None:
        from transformers import InternVLForConditionalGeneration

        if not isinstance(model, InternVLForConditionalGeneration):
            raise TypeError(
                f"expected an InternVLForConditionalGeneration, got {type(model).__name__} "
                "(of a wrapped model give the model inside, e.g. peft's get_base_model())"
            )

    def parts(self, model: nn.Module) -> Parts:
        return Parts(base=model.model, decoder=model.model.language_model, vision=model.model.vision_tower)

    def projector(self, model: nn.Module) -> nn.Module:
        return model.model.multi_modal_projector

    def tile_grid(self, model: nn.Module) -> tuple[int, int]:
        """Rows and columns of the tokens of one tile."""
        vision = model.config.vision_config
        rows, columns = (
            int(size // patch * model.config.downsample_ratio)
            for size, patch in zip(vision.image_size, vision.patch_size, strict=True)
        )
        return rows, columns

    def video_token_id(self, model: nn.Module) -> int:
        return model.config.image_token_id

    def holds_video(self, model: nn.Module, input_ids: torch.Tensor, tokenizer: Any | None) -> bool:
        return any(map(len, self._find(model, input_ids.cpu(), tokenizer)))

    def vision_token_ids(self, model: nn.Module, tokenizer: Any | None = None) -> tuple[int, ...]:
        placeholder = self.video_token_id(model)
        if tokenizer is not None:
            return (placeholder, *(tokenizer.convert_tokens_to_ids(tag) for tag in ("<img>", "</img>")))
        return (placeholder, *_OFFICIAL_TAGS) if self._is_official(model) else (placeholder,)

    def needs_token_types(self, model: nn.Module) -> bool:
        return False

    def has_video_features(self, inputs: Mapping[str, Any]) -> bool:
        return has_features(inputs, "pixel_values", "image")

    def locate(
        self,
        model: nn.Module,
        input_ids: torch.Tensor,
        valid: torch.Tensor,
        inputs: Mapping[str, Any],
        tokenizer: Any | None,
    ) -> Layout:
        rows, columns = self.tile_grid(model)
        of_sample = self._find(model, input_ids, tokenizer)
        frames = torch.zeros_like(valid)
        for row, videos in zip(frames, of_sample, strict=True):
            for start in (start for video in videos for start in video.starts):
                row[start : start + rows * columns] = True
        videos = [video for of_one in of_sample for video in of_one]
        grids = [(len(video.starts), rows, columns) for video in videos]
        layout = locate_videos(input_ids, valid, self.video_token_id(model), grids, placeholders=frames, closing_tags=1)
        for spans, video in zip(layout.frame_spans, videos, strict=True):
            spans[0, 0] = video.label
        return layout

    def regroup_copies(self, model: nn.Module, inputs: dict[str, Any], layout: Layout, copies: int) -> dict[str, Any]:
        pixels = inputs.get("pixel_values")
        if pixels is None:  # encoded, which transformers repeats as the placeholders are
            return inputs
        of_sample = pixels[::copies].split(self._count_tiles(model, layout))
        return {**inputs, "pixel_values": torch.cat([pixels for pixels in of_sample for _ in range(copies)])}

    def vision_in_order(self, model: nn.Module, features: torch.Tensor, layout: Layout, copies: int) -> torch.Tensor:
        return first_copies(features, self._count_tiles(model, layout), copies)

    def video_chunks(self, model: nn.Module, arguments: Mapping[str, Any], frames: int) -> list[dict[str, Any]]:
        name, pixels = first_argument(arguments, "[tiles, C, H, W]")
        return [{**arguments, name: part} for part in pixels.split(frames)]

    def join_chunks(
        self, model: nn.Module, arguments: Mapping[str, Any], chunks: list[dict[str, Any]], outputs: list[Any]
    ) -> Any:
        return join_fields(outputs) if isinstance(outputs[0], Mapping) else torch.cat(outputs)

    def gather_extras(self, inputs: Mapping[str, Any], sample: torch.Tensor, columns: torch.Tensor) -> dict[str, Any]:
        return {}

    def seconds_per_step(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        return None

    def chat_markers(self, model: nn.Module, tokenizer: Any | None) -> ChatMarkers | None:
        if tokenizer is not None:
            return resolve_markers(
                tokenizer,
                turn_start="<|im_start|>",
                user="user",
                newline="\n",
                turn_end="<|im_end|>",
                blanks=("\n",),
            )
        return _OFFICIAL_MARKERS if self._is_official(model) else None

    def _count_tiles(self, model: nn.Module, layout: Layout) -> list[int]:
        """Tiles of each sample, of videos and images."""
        rows, columns = self.tile_grid(model)
        return ((layout.input_ids == self.video_token_id(model)).sum(1) // (rows * columns)).tolist()

    def _is_official(self, model: nn.Module) -> bool:
        return self.video_token_id(model) == _OFFICIAL_IMAGE_TOKEN

    def _find(self, model: nn.Module, input_ids: torch.Tensor, tokenizer: Any | None) -> list[list]:
        """The videos of each sample."""
        rows, columns = self.tile_grid(model)
        if tokenizer is not None:
            turn_start = tokenizer.convert_tokens_to_ids("<|im_start|>")
        else:
            turn_start = _OFFICIAL_TURN_START if self._is_official(model) else None
        token = self.video_token_id(model)
        return [find_frames(ids, token, rows * columns, tokenizer, turn_start) for ids in input_ids]
