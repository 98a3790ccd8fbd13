"""Checkpoints from a folder or from the hub: the model, its processor, and the selector that some of them hold."""

from pathlib import Path
from typing import Any

import torch

from qts_video import released
from qts_video.adapters import ADAPTERS
from qts_video.methods.qtsplus import QTSplus
from qts_video.weights import Checkpoint

REMOTE = "internvl_chat"
KNOWN = f"{', '.join(sorted(ADAPTERS))}, and {released.MODEL_TYPE} (a whole QTSplus checkpoint)"


def load_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any, QTSplus | None]:
    """A model of any family that has an adapter, and its processor; with the selector, where the checkpoint is a whole
    QTSplus one.

    A QTSplus checkpoint becomes the Hugging Face class itself: its language model and vision tower are mapped into
    ``Qwen2_5_VLForConditionalGeneration``, its selector into ours. None of the code that lies with it is run. It was
    trained with consecutive positions: ``attach(..., positions="compact")`` gives those.

    Args:
        path_or_id: a folder, or a model on the hub.
        dtype: None keeps that of the checkpoint.
        device: None leaves the model on the CPU.
        attn_implementation: as in ``from_pretrained``.
        trust_remote_code: whether the code that lies with an ``internvl_chat`` checkpoint may run; no other needs it.

    Returns:
        The model (eval mode), the processor, and a selector of the model's dtype and device, or None.

    Raises:
        OSError: no such folder or model on the hub, or a file of it is missing.
        ValueError: a model of another kind, or one that needs ``trust_remote_code``.
        RuntimeError: tensors that are not those of the model described.
    """
    checkpoint = Checkpoint(path_or_id)
    kind = checkpoint.config.get("model_type")
    if kind == REMOTE:
        if not trust_remote_code:
            raise ValueError(
                f"{checkpoint.name} ({REMOTE}) runs code of its own: read it, then allow it with "
                "trust_remote_code=True; the same models in transformers' classes (names that end in -hf) need none"
            )
        from qts_video import internvl_chat

        model, processor = internvl_chat.load(_local(checkpoint.name), dtype, attn_implementation)
        selector = None
    elif kind in ADAPTERS:
        model, processor = _load_ordinary(checkpoint.name, dtype, attn_implementation)
        selector = None
    elif released.is_released(checkpoint.config):
        model, processor = _load_released(checkpoint, dtype, attn_implementation)
        selector = QTSplus(released.load_selector(checkpoint)).to(model.dtype)
    else:
        raise ValueError(f"{checkpoint.name} is a model of type {kind!r}; known types: {KNOWN}")
    if device is not None:
        model = model.to(device)
        selector = None if selector is None else selector.to(device)
    return model.eval(), processor, selector


def _load_ordinary(name: str, dtype: torch.dtype | None, attn_implementation: str | None) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = _local(name)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype or "auto", **options)
    return model, AutoProcessor.from_pretrained(name)


def _local(name: str) -> str:
    """A folder's path, or a hub id as it is."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def _load_released(
    checkpoint: Checkpoint, dtype: torch.dtype | None, attn_implementation: str | None
) -> tuple[Any, Any]:
    from accelerate import init_empty_weights
    from transformers import (
        GenerationConfig,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
    )

    # By its class: the processor class that such a checkpoint names is code of its own.
    processor = Qwen2_5_VLProcessor.from_pretrained(checkpoint.folder)
    state = released.map_state(checkpoint.tensors())
    options = released.model_config(checkpoint, processor.tokenizer, state)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    config = Qwen2_5_VLConfig(**options)
    with init_empty_weights(include_buffers=False):
        model = Qwen2_5_VLForConditionalGeneration(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    dtype = dtype or state["model.language_model.embed_tokens.weight"].dtype
    # The parameters alone: model.to(dtype) would round the rotary frequencies too, which stay in float32.
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    model.tie_weights()
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return model, processor
