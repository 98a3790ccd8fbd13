"""The model that lives in the world: a Qwen2.5-VL of about a million parameters, in transformers' own classes."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from .tokenizer import CHAT_TEMPLATE, build_tokenizer
from .world import MERGE, PATCH, SIDE

HIDDEN, FEED_FORWARD, LAYERS, HEADS = 128, 320, 4, 4
# Of 16 frequencies, half are time's, from one radian a second to one in 150 s; rows and columns get slower ones, so
# that what a token shows can be matched at any distance.
ROPE_THETA, MROPE_SECTION = 100000.0, (8, 4, 4)


def build_processor() -> Qwen2_5_VLProcessor:
    """Every video becomes frames of ``SIDE`` x ``SIDE`` pixels, where it is square: 4 x 4 tokens a step."""
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    videos = Qwen2VLVideoProcessor(size=dict(size))
    if hasattr(videos, "cap_pixels_per_frame"):
        videos.cap_pixels_per_frame = False  # unset it warns on every call
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        tokenizer=build_tokenizer(),
        video_processor=videos,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Any, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The untrained model, float32, with weights drawn from ``seed``."""
    tokenizer = processor.tokenizer
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": HIDDEN,
            "intermediate_size": FEED_FORWARD,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768,
            "rope_theta": ROPE_THETA,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": list(MROPE_SECTION)},
            "initializer_range": 0.04,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": SIDE,
            "fullatt_block_indexes": [0, 1],
            "tokens_per_second": 1,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():  # a word is said as it is read; those that are read are of the vision tower's tokens' size
        words = model.get_input_embeddings().weight
        model.lm_head.weight.copy_(words)
        words.mul_(8)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def load_model(folder: str | Path) -> Qwen2_5_VLForConditionalGeneration:
    """What ``save_pretrained`` wrote, in float32 and eval mode."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
