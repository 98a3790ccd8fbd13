"""A small Qwen2.5-VL that needs no download: the real model and processor classes, random weights, few tokens.

It exists for ``qts demo`` and for tests. Its answers mean nothing; its shapes, its token counts and its code path
are those of the checkpoints that people run.
"""

import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + render(message.content) + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# What the vocabulary is learnt from: enough for a question about shapes to be words and not bytes.
_CORPUS = """
system user assistant You are a helpful assistant. What happens in the video? Describe the video.
Which colour is the shape that moves? Where does the red circle go? When does the blue square appear?
How many shapes are there? Is the green triangle left or right of the yellow star?
The circle moves from left to right. A red, orange, yellow, green, blue, purple, white, black, grey shape:
circle, square, triangle, star, ring, cross. It moves up, down, left, right, slowly, fast, behind, before, after,
first, last, then, at the top, at the bottom. It starts at second zero and stops after ten seconds. Yes. No.
There is one, two, three, four, five, six, seven, eight.
"""

# Qwen's split: contractions, words with the space before them, single digits, punctuation, line ends, spaces.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The model, in eval mode, with random float32 weights drawn from ``seed``, and its processor."""
    processor = build_processor()
    return build_model(processor, seed), processor


def build_processor() -> Qwen2_5_VLProcessor:
    """Qwen2.5-VL's own processor over a byte-level vocabulary of a few hundred tokens."""
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 768 * 28 * 28}
    videos = Qwen2VLVideoProcessor(size=dict(size))
    if hasattr(videos, "cap_pixels_per_frame"):
        videos.cap_pixels_per_frame = False  # The reader bounds frames already; unset it warns on every call.
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(size)),
        tokenizer=_build_tokenizer(),
        video_processor=videos,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2_5_VLProcessor, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """4 decoder layers of width 256 and a 2-layer vision tower, about 3 million parameters, in eval mode."""
    tokenizer = processor.tokenizer
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    hidden = 256
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32768,
            "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model.eval()


def save(folder: str | Path, seed: int = 0) -> Path:
    """Write the checkpoint as ``from_pretrained`` reads it: ``qts ask --model FOLDER`` then runs it."""
    model, processor = build(seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _build_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([_CORPUS], trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    # Through a file, because that is the one way in that every version of transformers shares.
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",'
            ' "unk_token": null, "model_max_length": 32768}'
        )
        return AutoTokenizer.from_pretrained(folder)
