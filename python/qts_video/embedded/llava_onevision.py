"""A small LLaVA-OneVision."""

from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from qts_video.embedded.tokenizer import build_qwen_tokenizer, qwen2_config

SIZE, PATCH = 84, 14
PATCHES = (SIZE // PATCH) ** 2

# Videos and images first, each on a line of its own, then the text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content if part.type in ('image', 'video') -%}{{ '<' + part.type + '>\\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def build_processor() -> LlavaOnevisionProcessor:
    """Frames of 84 x 84 pixels, so 6 x 6 patches, pooled to 3 x 3 tokens; one newline token ends the video."""
    size = {"height": SIZE, "width": SIZE}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=dict(size), image_grid_pinpoints=[[SIZE, SIZE]]),
        tokenizer=build_qwen_tokenizer(("<image>", "<video>")),
        video_processor=LlavaOnevisionVideoProcessor(size=dict(size)),
        num_image_tokens=PATCHES,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaOnevisionProcessor) -> LlavaOnevisionForConditionalGeneration:
    """4 Qwen2 layers of width 128 and a 2-layer SigLIP tower."""
    tokenizer = processor.tokenizer
    config = LlavaOnevisionConfig(
        text_config=qwen2_config(tokenizer),
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[SIZE, SIZE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return LlavaOnevisionForConditionalGeneration(config)
