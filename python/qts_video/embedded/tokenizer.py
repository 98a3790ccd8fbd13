"""Tokenizers of a few hundred tokens that split, join and mark text as those of the real models do."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Qwen's special tokens that open and close the turns of a chat."""

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


_LLAMA_SPACE = "\u2581"


def build_qwen_tokenizer(vision_tokens: Sequence[str], named: dict[str, str] | None = None) -> Any:
    """A byte-level ``Qwen2Tokenizer`` with Qwen's split and chat markers.

    Args:
        vision_tokens: special tokens besides those of ``CHATML``.
        named: special tokens that the tokenizer is to give by name: ``tokenizer.<name>`` and ``<name>_id``.
    """
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
    tokenizer.add_special_tokens([*CHATML, *vision_tokens])
    return load_tokenizer(
        tokenizer,
        tokenizer_class="Qwen2Tokenizer",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        unk_token=None,
        extra_special_tokens=named or {},
    )


def build_llama_tokenizer(vision_tokens: Sequence[str]) -> Any:
    """A ``LlamaTokenizerFast`` as Llama 2's: spaces are part of the words behind them, unknown characters become
    bytes, ``<s>`` comes first, and no token marks a turn. As with the real ones, transformers 4 puts one more space
    before every piece of text between special tokens, transformers 5 before the first alone."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        initial_alphabet=[chr(code) for code in range(33, 127)],
    )
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", _LLAMA_SPACE)
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator(_CORPUS.splitlines(), trainer)
    model = json.loads(learner.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(model["vocab"], [tuple(m) for m in model["merges"]], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_LLAMA_SPACE), normalizers.Replace(" ", _LLAMA_SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_LLAMA_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *vision_tokens, "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return load_tokenizer(
        tokenizer,
        tokenizer_class="LlamaTokenizerFast",
        legacy=False,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def load_tokenizer(tokenizer: Tokenizer, **config: Any) -> Any:
    """The tokenizer of transformers around ``tokenizer``: through files, the one way in that every version shares."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 32768}))
        return AutoTokenizer.from_pretrained(folder)


def qwen2_config(tokenizer: Any) -> dict[str, Any]:
    """Of a Qwen2 with 4 layers of width 128, for ``tokenizer``."""
    return {
        "model_type": "qwen2",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
