"""One word, one token: all that questions and answers are made of, and the chat's markers."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from qts_video.embedded.tokenizer import CHATML, load_tokenizer

from .world import COLOURS, COUNTS, DIRECTIONS, LONGEST, SHAPES, SLOT

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_UNKNOWN = "<unk>"
_WORDS = (
    "user assistant ? which colour shape is the comes first or where does move when appear how many shapes "
    "second seconds at what there are a in video last it to . ,"
)

# No system turn and no line breaks: every token of a prompt is there for a reason.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + ' ' }}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant' }}{%- endif -%}
"""


def answers() -> list[str]:
    """Every word that is an answer."""
    return [*COLOURS, *SHAPES, *DIRECTIONS, *COUNTS, *(str(second) for second in range(0, LONGEST, SLOT))]


def build_tokenizer() -> Any:
    """A word-level tokenizer with Qwen's chat markers. Case and line breaks don't count; other words are unknown."""
    words = dict.fromkeys([_UNKNOWN, *answers(), *_WORDS.split()])
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Sequence([decoders.Fuse()])
    tokenizer.add_special_tokens([*CHATML, *VISION_TOKENS])
    return load_tokenizer(
        tokenizer,
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=_UNKNOWN,
    )
