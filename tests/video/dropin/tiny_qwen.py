"""A tiny Qwen2.5-VL, and prompts for it."""

from collections.abc import Callable, Sequence

import torch
from tiny import (
    HIDDEN,
    IMAGE,
    NEEDS_TOKEN_TYPES,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Image,
    Part,
    Video,
    assistant,
    pad,
    prompt,
    ready,
    user,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

MERGE, PATCH = 2, 14


def build_model(attn: str = "sdpa", **text_options) -> Qwen2_5_VLForConditionalGeneration:
    rope = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=TEXT | {"rope_scaling": rope} | text_options,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    torch.manual_seed(0)
    return ready(Qwen2_5_VLForConditionalGeneration(config), attn)


def inputs(*samples: list[Part], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """What the processor would return for ``samples``, padded on ``side``."""

    def placeholders(video: Video) -> list[int]:
        return [VISION_START, *[VIDEO] * video.tokens, VISION_END]

    batch = qwen_inputs(samples, side, seed, PATCH, placeholders)
    seconds = [part.seconds for sample in samples for part in sample if isinstance(part, Video)]
    return batch | ({"second_per_grid_ts": torch.tensor(seconds)} if seconds else {})


def qwen_inputs(
    samples: Sequence[list[Part]], side: str, seed: int, patch: int, placeholders: Callable[[Video], list[int]]
) -> dict[str, torch.Tensor]:
    """The same without times, for a Qwen-VL whose patches are ``patch`` pixels wide; ``placeholders`` of a video are
    its ids in the prompt."""
    generator = torch.Generator().manual_seed(seed)
    rows, pixels, grids = [], {Video: [], Image: []}, {Video: [], Image: []}
    for sample in samples:
        ids = []
        for part in sample:
            if isinstance(part, list):
                ids += part
                continue
            kind = type(part)
            grid = (part.t if kind is Video else 1, part.rows * MERGE, part.columns * MERGE)
            grids[kind].append(grid)
            patches = grid[0] * grid[1] * grid[2]
            pixels[kind].append(torch.randn(patches, 3 * 2 * patch * patch, generator=generator, dtype=torch.float64))
            ids += placeholders(part) if kind is Video else [VISION_START, *[IMAGE] * part.tokens, VISION_END]
        rows.append(ids)
    batch = pad(rows, side)
    for kind, suffix, grid_name in (
        (Video, "pixel_values_videos", "video_grid_thw"),
        (Image, "pixel_values", "image_grid_thw"),
    ):
        if pixels[kind]:
            batch[suffix] = torch.cat(pixels[kind])
            batch[grid_name] = torch.tensor(grids[kind])
    if NEEDS_TOKEN_TYPES:
        ids = batch["input_ids"]
        batch["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return batch


PROMPTS = {
    "one": [prompt(user(Video(4), [30, 31, 32]))],
    "unequal": [
        prompt(user([40], Video(4), [30, 31, 32])),
        prompt(user(Video(2, 3, 2), [33])),
        prompt(user(Video(3, 2, 2), [34, 35]), assistant(50, 51), user([36, 37])),
    ],
    "several": [
        prompt(user(Image(), Video(3), [30], Video(2, 2, 2), [31, 32])),
        prompt(user([33], Video(4, 2, 2), Image(2, 3), [34])),
    ],
    "images": [prompt(user(Image(), [30, 31])), prompt(user(Image(3, 2), [32, 33, 34]))],
}
"""For every Qwen-VL."""

FAMILY = Family(
    name="qwen2_5_vl",
    build_model=build_model,
    inputs=inputs,
    prompts=PROMPTS,
    vision="model.visual",
)
