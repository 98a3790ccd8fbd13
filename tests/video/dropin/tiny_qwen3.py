"""A tiny Qwen3-VL, prompts for it, and a tokenizer that reads their time labels."""

import torch
from tiny import (
    HIDDEN,
    IMAGE,
    TEXT,
    VERSION,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Part,
    Video,
    ready,
)
from tiny_qwen import MERGE, PROMPTS, qwen_inputs
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

PATCH = 16
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

    def placeholders(video: Video) -> list[int]:
        step = [VISION_START, *[VIDEO] * (video.rows * video.columns), VISION_END]
        # The mean time of a step's two frames is written in front of it.
        return [i for t in range(video.t) for i in [*label((t + 0.25) * video.seconds), *step]]

    return qwen_inputs(samples, side, seed, PATCH, placeholders)


FAMILY = Family(
    name="qwen3_vl",
    build_model=build_model,
    inputs=inputs,
    prompts=PROMPTS,
    vision="model.visual",
    repeats=VERSION >= (5,),  # 4.57 takes every time step for a video when it repeats a sample's
)
