"""A small Qwen3-VL."""

from transformers import (
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from qts_video.embedded.qwen2_5_vl import RENDER, TURNS, VISION_TOKENS
from qts_video.embedded.tokenizer import build_qwen_tokenizer

CHAT_TEMPLATE = RENDER + TURNS  # without a system turn of its own


def build_processor() -> Qwen3VLProcessor:
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 768 * 32 * 32}
    videos = Qwen3VLVideoProcessor(size=dict(size))
    if hasattr(videos, "cap_pixels_per_frame"):
        videos.cap_pixels_per_frame = False  # The reader bounds frames already; unset it warns on every call.
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size), patch_size=16),
        tokenizer=build_qwen_tokenizer(VISION_TOKENS),
        video_processor=videos,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen3VLProcessor) -> Qwen3VLForConditionalGeneration:
    """4 decoder layers of width 128 and a 3-layer vision tower, of which two feed the decoder's first layers."""
    tokenizer = processor.tokenizer
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768,
            "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration(config)
