"""A tiny Qwen3-VL, prompts for it, and a tokenizer that reads their time labels."""

import torch
from tiny import (
    HIDDEN,
    IMAGE,
    NEEDS_TOKEN_TYPES,
    TEXT,
    VERSION,
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
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

MERGE, PATCH = 2, 16
LABEL = {piece: number for number, piece in enumerate(["<", *"0123456789", ".", " seconds", ">"], 470)}
"""What time labels are written with; as in Qwen's vocabulary, a digit is a token."""


def build_model(attn: str = "sdpa") -> Qwen3VLForConditionalGeneration:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        text_config=TEXT | {"head_dim": 16, "rope_scaling": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return ready(Qwen3VLForConditionalGeneration(config), attn)


def label(seconds: float) -> list[int]:
    """ "<0.5 seconds>", as the processor writes it in front of a time step."""
    return [LABEL["<"], *(LABEL[character] for character in f"{seconds:.1f}"), LABEL[" seconds"], LABEL[">"]]


def inputs(*samples: list[Part], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """What the processor would return for ``samples``, padded on ``side``."""
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
            pixels[kind].append(torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=generator, dtype=torch.float64))
            if kind is Image:
                ids += [VISION_START, *[IMAGE] * part.tokens, VISION_END]
                continue
            for step in range(part.t):
                time = label((step + 0.25) * part.seconds)  # the mean time of a step's two frames
                ids += [*time, VISION_START, *[VIDEO] * (part.rows * part.columns), VISION_END]
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


FAMILY = Family(
    name="qwen3_vl",
    build_model=build_model,
    inputs=inputs,
    prompts={
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
    },
    vision="model.visual",
    repeats=VERSION >= (5,),  # 4.57 takes every time step for a video when it repeats a sample's
)
