"""Checkpoints from a folder or from the hub: the model, its processor, and the selector that some of them hold."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration


def load_model(
    path_or_id: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any, Any]:
    """(model in eval mode, processor, selector or None) of a Qwen2.5-VL checkpoint.

    Raises:
        OSError: no such folder, or no such model on the hub.
        ValueError: a model of another kind.
    """
    name = str(path_or_id)
    config = AutoConfig.from_pretrained(name)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"a {config.model_type} model; expected qwen2_5_vl")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(name, dtype=dtype)
    return model.to(device).eval(), AutoProcessor.from_pretrained(name), None
