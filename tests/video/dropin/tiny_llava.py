"""Tiny LLaVA-OneVision and LLaVA-NeXT-Video models, and prompts for them."""

from functools import partial

import torch
from qts_video.newlines import newline_layout
from tiny import (
    IMAGE,
    TEXT,
    VERSION,
    VIDEO,
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
from transformers import (
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

PATCH = 14
ONEVISION_PATCHES, NEXT_PATCHES = 5, 4  # a side; a video's 3 x 3 and 2 x 2 tokens a frame
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
}
PLACEHOLDERS = {"image_token_index": IMAGE, "video_token_index": VIDEO}


def build_onevision(
    attn: str = "sdpa", *, newlines: str | None = None, patches: int = ONEVISION_PATCHES, **options
) -> LlavaOnevisionForConditionalGeneration:
    """``newlines``: of ``newline_layout``; None leaves transformers' own. ``options``: of the configuration."""
    size = patches * PATCH
    config = LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2"},
        vision_config=VISION | {"model_type": "siglip_vision_model", "image_size": size, "vision_use_head": False},
        image_grid_pinpoints=[[size, size]],
        **PLACEHOLDERS,
        **options,
    )
    torch.manual_seed(0)
    model = ready(LlavaOnevisionForConditionalGeneration(config), attn)
    if newlines is not None:
        newline_layout(model, newlines)
    return model


def build_next(attn: str = "sdpa", **options) -> LlavaNextVideoForConditionalGeneration:
    size = NEXT_PATCHES * PATCH
    config = LlavaNextVideoConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=VISION | {"model_type": "clip_vision_model", "image_size": size, "projection_dim": 32},
        image_grid_pinpoints=[[size, size]],
        **PLACEHOLDERS,
        **options,
    )
    torch.manual_seed(0)
    return ready(LlavaNextVideoForConditionalGeneration(config), attn)


def inputs(
    *samples: list[Part], tokens: tuple[int, int, int], patches: int, side: str = "left", seed: int = 1
) -> dict[str, torch.Tensor]:
    """What the processor would return for ``samples``. ``tokens``: of a frame, newlines of a frame, and of a video."""
    generator = torch.Generator().manual_seed(seed)
    of_frame, newlines, behind = tokens
    size = patches * PATCH
    rows, videos, images = [], [], []
    for sample in samples:
        ids = []
        for part in sample:
            if isinstance(part, Video):
                videos.append(torch.randn(part.t, 3, size, size, generator=generator, dtype=torch.float64))
                ids += [VIDEO] * (part.t * (of_frame + newlines) + behind)
            elif isinstance(part, Image):
                # The whole image, then its one tile with a newline behind every row.
                images.append(torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64))
                ids += [IMAGE] * (patches * patches + patches * (patches + 1))
            else:
                ids += part
        rows.append(ids)
    batch = pad(rows, side)
    if videos:
        batch["pixel_values_videos"] = torch.stack(videos)
    if images:
        batch["pixel_values"] = torch.stack(images)
        batch["image_sizes"] = torch.tensor([[size, size]] * len(images))
    return batch


PROMPTS = {
    "one": [prompt(user(Video(4), [30, 31, 32]))],
    "unequal": [
        prompt(user([40], Video(3), [30, 31, 32])),
        prompt(user(Video(3), [33])),
        prompt(user(Video(3), [34, 35]), assistant(50, 51), user([36, 37])),
    ],
    "several": [
        prompt(user(Image(), Video(3), [30], Video(3), [31, 32])),
        prompt(user([33], Video(3), Image(), [34])),
    ],
    "images": [prompt(user(Image(), [30, 31])), prompt(user(Image(), [32, 33, 34]))],
}
# Before, generate() repeats video by video, so that a sample's videos A, B become A, A, B, B for two beams.
REPEATS = VERSION >= (5, 18)
TOKENS = {"one_token": (9, 0, 1), "frame": (9, 1, 0), "grid": (9, 3, 0)}


def _onevision(newlines: str | None) -> Family:
    return Family(
        name="llava_onevision" if newlines is None else f"llava_onevision {newlines}",
        build_model=partial(build_onevision, newlines=newlines),
        inputs=partial(inputs, tokens=TOKENS[newlines or "one_token"], patches=ONEVISION_PATCHES),
        prompts=PROMPTS,
        vision="model.vision_tower",
        repeats=REPEATS,
    )


NEXT = Family(
    name="llava_next_video",
    build_model=build_next,
    inputs=partial(inputs, tokens=(4, 0, 0), patches=NEXT_PATCHES),
    prompts=PROMPTS,
    vision="model.vision_tower",
    repeats=REPEATS,
)
FAMILIES = (_onevision(None), _onevision("grid"), _onevision("frame"), NEXT)


POSITIONS = ("grid", "frame", "one_token", "no_token")


def walk(grid, position):
    """The tokens of a video in the order of the prompt: (frame, row, column) each, or a newline, as the set of the
    tokens before it that share it."""
    frames, height, width = grid
    tokens, line = [], set()
    for frame in range(frames):
        for row in range(height):
            for column in range(width):
                tokens.append((frame, row, column))
                line.add(tokens[-1])
            if position == "grid":
                tokens.append(frozenset(line))
                line = set()
        if position == "frame":
            tokens.append(frozenset(line))
            line = set()
    return [*tokens, frozenset(line)] if position == "one_token" else tokens


def span_of(grid, position):
    frames, height, width = grid
    return {"grid": width, "frame": height * width, "one_token": frames * height * width, "no_token": 0}[position]


def cost(grid, position, tokens):
    """Places that ``tokens`` take with their newlines."""
    _, height, width = grid
    places = {(i // (height * width), i // width % height, i % width) for i in tokens}
    newlines = [what for what in walk(grid, position) if isinstance(what, frozenset)]
    return len(places) + sum(position == "one_token" or bool(places & line) for line in newlines)
