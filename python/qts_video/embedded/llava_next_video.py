"""A small LLaVA-NeXT-Video."""

from transformers import (
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
)

from qts_video.embedded.tokenizer import build_llama_tokenizer

SIZE, PATCH = 84, 14

# Vicuna's turns: "USER: <video>\nquestion ASSISTANT:". No token marks them.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content[0].text }}
{%- else -%}
{{ message.role.upper() + ': ' }}
{%- for part in message.content if part.type in ('image', 'video') -%}{{ '<' + part.type + '>\\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text + ' ' }}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""


def build_processor() -> LlavaNextVideoProcessor:
    """Frames shrunk and cut to 84 x 84 pixels, so 6 x 6 patches, pooled to 3 x 3 tokens; no newlines."""
    size, crop = {"shortest_edge": SIZE}, {"height": SIZE, "width": SIZE}
    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(size=dict(size), crop_size=dict(crop)),
        image_processor=LlavaNextImageProcessor(
            size=dict(size), crop_size=dict(crop), image_grid_pinpoints=[[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
        ),
        tokenizer=build_llama_tokenizer(("<video>", "<image>")),
        chat_template=CHAT_TEMPLATE,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaNextVideoProcessor) -> LlavaNextVideoForConditionalGeneration:
    """4 Llama layers of width 128 and a 3-layer CLIP tower, of which the last layer is not used."""
    tokenizer = processor.tokenizer
    config = LlavaNextVideoConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "projection_dim": 64,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[SIZE, 2 * SIZE], [2 * SIZE, SIZE]],
    )
    return LlavaNextVideoForConditionalGeneration(config)
