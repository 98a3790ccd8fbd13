"""A small InternVL in transformers' own classes."""

from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from qts_video.embedded.tokenizer import build_qwen_tokenizer, qwen2_config

SIZE, PATCH = 84, 14
TOKENS = (SIZE // PATCH // 2) ** 2

NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<IMG_CONTEXT>\\n' }}
{%- elif part.type == 'video' -%}{{ '<video>\\n' }}
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def build_processor() -> InternVLProcessor:
    """Frames of 84 x 84 pixels, so 6 x 6 patches, shuffled into 3 x 3 tokens; "Frame1: <img>" precedes a frame's."""
    size = {"height": SIZE, "width": SIZE}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=dict(size)),
        tokenizer=build_qwen_tokenizer(tuple(NAMED.values()), NAMED),
        video_processor=InternVLVideoProcessor(size=dict(size)),
        image_seq_length=TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: InternVLProcessor) -> InternVLForConditionalGeneration:
    """4 Qwen2 layers of width 128 and a 2-layer vision tower."""
    tokenizer = processor.tokenizer
    config = InternVLConfig(
        text_config=qwen2_config(tokenizer),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [SIZE, SIZE],
            "patch_size": [PATCH, PATCH],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)
