"""What LLaVA-OneVision and LLaVA-NeXT-Video share: grids come from the frames given, newlines from the prompt."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qts_video.adapters.base import Parts, check_class, has_features
from qts_video.adapters.joined import first_argument, join_fields
from qts_video.adapters.vision_order import first_copies
from qts_video.dropin.layout import Layout, locate_videos
from qts_video.dropin.question import ChatMarkers, resolve_markers

BLANKS = (" ", "\n", " \n", "\n\n")
"""What the chat templates put around the text of a turn, as vocabularies may merge it."""


def chatml_markers(tokenizer: Any) -> ChatMarkers:
    """Of ``<|im_start|>user ... <|im_end|>``. Raises ValueError where ``tokenizer`` does not know them."""
    return resolve_markers(
        tokenizer, turn_start="<|im_start|>", user="user", newline="\n", turn_end="<|im_end|>", blanks=BLANKS
    )


def newline_layouts(grid: tuple[int, int, int]) -> dict[str, int]:
    """How many successive tokens of a video of this grid (frames, rows, columns) share a newline token, by
    ``mm_newline_position``; 0 where there are no newlines."""
    frames, rows, columns = grid
    return {"grid": columns, "frame": rows * columns, "one_token": frames * rows * columns, "no_token": 0}


def count_tokens(grid: tuple[int, int, int], span: int) -> int:
    """Tokens of a video, with a newline behind every ``span`` of them (0: none)."""
    tokens = math.prod(grid)
    return tokens + (tokens // span if span else 0)


class Llava:
    """Adapter of the models in which every frame is pooled to the same square of tokens, positions are counted one by
    one, and newline tokens (the parameter ``image_newline``) may stand among those of a video."""

    class_name: str
    host_inputs = ()
    # LLaVA-Video samples one frame a second, and its processors do not say when a frame is.
    default_seconds_per_step = 1.0
    rope_axes = 1
    positions_carry_time = False
    video_encoder = "get_video_features"

    def frame_grids(self, model: nn.Module) -> tuple[tuple[int, int], ...]:
        """(rows, columns) that the tokens of a frame may have in a prompt; the model's own first."""
        raise NotImplementedError

    def check(self, model: nn.Module) -> None:
        check_class(model, self.class_name)

    def parts(self, model: nn.Module) -> Parts:
        return Parts(base=model.model, decoder=model.model.language_model, vision=model.model.vision_tower)

    def projector(self, model: nn.Module) -> nn.Module:
        return model.model.multi_modal_projector

    def video_token_id(self, model: nn.Module) -> int:
        return model.config.video_token_id

    def holds_video(self, model: nn.Module, input_ids: torch.Tensor, tokenizer: Any | None) -> bool:
        return bool((input_ids == self.video_token_id(model)).any())

    def vision_token_ids(self, model: nn.Module, tokenizer: Any | None = None) -> tuple[int, ...]:
        return (model.config.image_token_id, model.config.video_token_id)

    def needs_token_types(self, model: nn.Module) -> bool:
        return False

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
        token = self.video_token_id(model)
        placeholders = int((input_ids == token).sum())
        videos, frames = _count_videos(inputs, placeholders)
        grids = [(frames, *of_frame) for of_frame in self.frame_grids(model)]
        configured = getattr(model.config, "mm_newline_position", None)
        grid, span = _grid_and_span(placeholders, videos, grids, configured)
        return locate_videos(input_ids, valid, token, [grid] * videos, newline_spans=[span] * videos)

    def regroup_copies(self, model: nn.Module, inputs: dict[str, Any], layout: Layout, copies: int) -> dict[str, Any]:
        return inputs

    def vision_in_order(self, model: nn.Module, features: torch.Tensor, layout: Layout, copies: int) -> torch.Tensor:
        return first_copies(features, layout.per_sample([frames for frames, _, _ in layout.grids]), copies)

    def video_chunks(self, model: nn.Module, arguments: Mapping[str, Any], frames: int) -> list[dict[str, Any]]:
        name, pixels = first_argument(arguments, "[V, F, C, H, W]")
        return [{**arguments, name: part[None]} for part in pixels.flatten(0, 1).split(frames)]

    def join_chunks(
        self, model: nn.Module, arguments: Mapping[str, Any], chunks: list[dict[str, Any]], outputs: list[Any]
    ) -> Any:
        videos, frames = next(iter(arguments.values())).shape[:2]
        of_chunks = [next(iter(chunk.values())).shape[1] for chunk in chunks]

        def join(parts: list) -> torch.Tensor | tuple[torch.Tensor, ...]:
            if not isinstance(parts[0], torch.Tensor):  # of every video, [F, M, D]
                return torch.cat([part[0] for part in parts]).split(frames)
            return _join_tokens(parts, of_chunks, videos, [math.prod(grid) for grid in self.frame_grids(model)])

        return join_fields(outputs, pooler_output=join) if isinstance(outputs[0], Mapping) else join(outputs)

    def gather_extras(self, inputs: Mapping[str, Any], sample: torch.Tensor, columns: torch.Tensor) -> dict[str, Any]:
        return {}

    def seconds_per_step(self, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        return None


def _join_tokens(parts: list[torch.Tensor], frames: list[int], videos: int, sizes: list[int]) -> torch.Tensor:
    """The tokens [V, M, D] of videos, with a newline behind each video where there is one behind each part.

    Args:
        parts: [1, M', D] of every chunk, in the order of the frames.
        frames: of every chunk.
        videos: V, all of the same length.
        sizes: how many tokens a frame may have.

    Raises RuntimeError for another number of tokens.
    """
    length, width = parts[0].shape[1:]
    tokens = next((size for size in sizes if length - frames[0] * size in (0, 1)), None)
    if tokens is None:
        raise RuntimeError(
            f"{frames[0]} frames were encoded as {length} tokens; expected {' or '.join(map(str, sizes))} a frame, and "
            "a newline"
        )
    of_frames = [rows for part, count in zip(parts, frames, strict=True) for rows in part[0].split(tokens)[:count]]
    newline = parts[0][0, frames[0] * tokens :]
    of_video = sum(frames) // videos
    starts = range(0, len(of_frames), of_video)
    pieces = [piece for start in starts for piece in (*of_frames[start : start + of_video], newline)]
    return torch.cat(pieces).view(videos, -1, width)


def _count_videos(inputs: Mapping[str, Any], placeholders: int) -> tuple[int, int]:
    """How many videos there are, and how many frames each of them has: these models take no others in one batch."""
    pixels = inputs.get("pixel_values_videos")
    if pixels is not None:
        if pixels.ndim != 5:
            raise ValueError(f"pixel_values_videos must have shape [V, F, C, H, W], got {list(pixels.shape)}")
        return pixels.shape[0], pixels.shape[1]
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("video")
    features, of_frames = (getattr(encoded, name, None) for name in ("pooler_output", "last_hidden_state"))
    if features is None or of_frames is None:
        raise ValueError(
            "the frames of a video can't be counted without pixel_values_videos: give them, or in "
            'mm_encoder_outputs["video"] the whole output of get_video_features, last_hidden_state included'
        )
    # generate() repeats the features for beams, but not the prompt that is looked at here, nor the hidden states.
    videos, rest = divmod(placeholders, math.prod(features[0].shape[:-1]))
    if rest or videos == 0 or len(of_frames) % videos:
        raise ValueError(
            f"input_ids hold {placeholders} video placeholders, and mm_encoder_outputs {len(of_frames)} frames in "
            f"videos of {math.prod(features[0].shape[:-1])} tokens: they do not belong together"
        )
    return videos, len(of_frames) // videos


def _grid_and_span(
    placeholders: int, videos: int, grids: list[tuple[int, int, int]], configured: str | None
) -> tuple[tuple[int, int, int], int]:
    """Which of ``grids`` the videos have, and how many tokens share a newline, by the number of placeholders.

    No two layouts of a grid have the same number of newlines unless they are the same (of a single frame or a single
    row). No two grids have a number in common: pooling by 2 takes more tokens than newlines can make up for, or none.
    """
    counts = {
        (grid, name): videos * count_tokens(grid, span)
        for grid in grids
        for name, span in newline_layouts(grid).items()
    }
    found = next((layout for layout, count in counts.items() if count == placeholders), None)
    of_frames = f"{placeholders} video placeholders for {videos} videos of {grids[0][0]} frames"
    if found is None:
        expected = "; ".join(
            f"of {grid[1]} x {grid[2]} tokens, "
            + ", ".join(f"{counts[grid, name]} ({name})" for name in newline_layouts(grid))
            for grid in dict.fromkeys(grids)
        )
        raise ValueError(f"input_ids hold {of_frames}; expected, by where newline tokens stand: {expected}")
    grid, name = found
    layouts = newline_layouts(grid)
    if configured is not None and configured not in layouts:
        raise ValueError(f"config.mm_newline_position must be one of {', '.join(layouts)}, got {configured!r}")
    if configured is not None and layouts[configured] != layouts[name]:
        raise ValueError(
            f"config.mm_newline_position is {configured!r}, but {of_frames} of {grid[1]} x {grid[2]} tokens are the "
            f"layout {name!r} ({configured!r} would be {counts[grid, configured]}); see qts_video.newlines"
        )
    return grid, layouts[name]
