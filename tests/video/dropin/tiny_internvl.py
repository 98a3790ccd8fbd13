"""A tiny InternVL, and prompts for it."""

import torch
from tiny import (
    IMAGE,
    NEWLINE,
    TEXT,
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
from transformers import InternVLConfig, InternVLForConditionalGeneration

SIZE, PATCH, SIDE = 56, 14, 2
TILE = SIDE * SIDE
FRAME, COLON, DIGITS = 480, 481, range(490, 500)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [SIZE, SIZE],
    "patch_size": [PATCH, PATCH],
}


def build_model(attn: str = "sdpa") -> InternVLForConditionalGeneration:
    text = TEXT | {"model_type": "qwen2"}
    config = InternVLConfig(
        text_config=text,
        vision_config=VISION,
        image_token_id=IMAGE,
        image_seq_length=TILE,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return ready(InternVLForConditionalGeneration(config), attn)


def number(value: int) -> list[int]:
    return [DIGITS[int(digit)] for digit in str(value)]


def frame(value: int) -> list[int]:
    """A frame as the processor labels it: "Frame1: <img>...</img>"."""
    return [FRAME, *number(value), COLON, VISION_START, *[IMAGE] * TILE, VISION_END]


def tiles(part: Part) -> int:
    """Tiles of a video or an image; of an image, as many as it has rows."""
    return part.t if isinstance(part, Video) else part.rows


def inputs(*samples: list[Part], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """What the processor would return for ``samples``, padded on ``side``."""
    generator = torch.Generator().manual_seed(seed)
    rows, total = [], 0
    for sample in samples:
        ids = []
        for part in sample:
            if isinstance(part, list):
                ids += part
                continue
            total += tiles(part)
            if isinstance(part, Video):
                frames = [frame(value + 1) for value in range(part.t)]
                ids += [token for of_frame in frames for token in (*of_frame, NEWLINE)]
            else:
                ids += [VISION_START, *[IMAGE] * (TILE * tiles(part)), VISION_END, NEWLINE]
        rows.append(ids)
    batch = pad(rows, side)
    if total:
        pixels = torch.randn(total, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
        batch["pixel_values"] = pixels
    return batch


FAMILY = Family(
    name="internvl",
    build_model=build_model,
    inputs=inputs,
    prompts={
        "one": [prompt(user(Video(4), [30, 31, 32]))],
        "unequal": [
            prompt(user([40], Video(4), [30, 31, 32])),
            prompt(user(Video(2), [33])),
            prompt(user(Video(3), [34, 35]), assistant(50, 51), user([36, 37])),
        ],
        "several": [
            prompt(user([33], Video(11), Image(1), [34])),
            prompt(user(Image(3), Video(3), [30], Video(2), [31, 32])),
        ],
        "images": [prompt(user(Image(1), [30, 31])), prompt(user(Image(2), Image(1), Image(1), [32, 33, 34]))],
    },
    vision="model.vision_tower",
)
