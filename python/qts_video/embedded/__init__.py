"""Small models that need no download: the real model and processor classes, random weights, few tokens.

They exist for tests, one of every family that a selector can be attached to. Their answers mean nothing; their prompts,
their token counts and their code paths are those of the checkpoints that people run. ``load`` gives one that was
trained: it answers questions about the films of ``qts_video.miniworld``.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

MODEL_TYPES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "internvl")


TRAINED = Path(__file__).parent / "trained"
"""The model that was trained in the miniature world, and its selectors; README.md says how and how well."""


def load() -> tuple[Any, Any, Any]:
    """(model, processor, QTSplus selector) that were trained in the miniature world: float32, in eval mode. The
    selector's ``positions`` are those that it was trained with, "original"."""
    from transformers import AutoProcessor

    from qts_video.methods import QTSplus
    from qts_video.miniworld.model import load_model

    selector = QTSplus.from_pretrained(TRAINED / "qtsplus").float()
    selector.positions = "original"
    return load_model(TRAINED / "model"), AutoProcessor.from_pretrained(TRAINED / "model"), selector


def build(model_type: str = "qwen2_5_vl", seed: int = 0) -> tuple[Any, Any]:
    """The model, in eval mode, with random float32 weights drawn from ``seed``, and its processor.

    Raises ValueError where ``model_type`` is none of ``MODEL_TYPES``.
    """
    processor = build_processor(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _family(model_type).build_model(processor)
    tokenizer = processor.tokenizer
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), processor


def build_processor(model_type: str = "qwen2_5_vl") -> Any:
    """The family's own processor over a vocabulary of a few hundred tokens."""
    return _family(model_type).build_processor()


def save(folder: str | Path, seed: int = 0, *, model_type: str = "qwen2_5_vl") -> Path:
    """Write the checkpoint as ``from_pretrained`` reads it: ``qts ask --model FOLDER`` then runs it."""
    model, processor = build(model_type, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)


def _family(model_type: str) -> Any:
    """The module of a family: importing it imports the family's classes alone."""
    if model_type not in MODEL_TYPES:
        raise ValueError(f"no embedded model of type {model_type!r}; known types: {', '.join(MODEL_TYPES)}")
    return import_module(f"qts_video.embedded.{model_type}")
