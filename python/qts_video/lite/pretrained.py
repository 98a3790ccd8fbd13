"""The start of a training: a selector whose small language model has read text before."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qts_video.lite.config import DEAD
from qts_video.lite.model import LiteSelector, check_names
from qts_video.lite.released import read_text_entries
from qts_video.weights import Checkpoint


def from_language_model(model: nn.Module, path_or_id: str | Path, *, seed: int = 0) -> LiteSelector:
    """A selector for ``model`` with the language model of a Qwen2 or Qwen2.5 checkpoint (the published selectors
    started from one of half a billion parameters); its projector is random.

    What does not reach the scores is left out: the head, the final norm, and of the last layer all but what makes
    queries and keys.

    Args:
        model: the big model that the selector is for.
        path_or_id: a checkpoint of ``Qwen2ForCausalLM``; a folder, or an id on the hub.
        seed: of the projector's weights.

    Returns:
        A selector in float32, on the device of ``model``, in eval mode.

    Raises:
        FileNotFoundError: there is none, or a file of it is missing.
        TypeError: no Lite selector fits such a model.
        ValueError: a checkpoint of another kind, with an arithmetic that is not Qwen2's, without a tensor, or with
            another vocabulary than the model.
    """
    checkpoint = Checkpoint(path_or_id)
    kind = checkpoint.config.get("model_type")
    if kind != "qwen2":
        raise ValueError(f"{checkpoint.name}: expected a language model with model_type 'qwen2', got {kind!r}")
    tensors = checkpoint.tensors(("model.",))
    sizes = read_text_entries(checkpoint, checkpoint.config)
    if "model.embed_tokens.weight" not in tensors:
        raise ValueError(f"{checkpoint.name} lacks model.embed_tokens.weight")
    sizes["vocab_size"] = len(tensors["model.embed_tokens.weight"])
    student = LiteSelector.build(model, seed=seed, **sizes).float()
    student.check_fits(model)
    state = _living(tensors, sizes)
    check_names(checkpoint.name, set(student.decoder.state_dict()), set(state))
    student.decoder.load_state_dict(state)
    return student


def _living(tensors: dict[str, torch.Tensor], sizes: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What reaches the scores, by the decoder's own names."""
    dead = tuple(f"layers.{sizes['layers'] - 1}.{part}." for part in DEAD)
    named = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name != "norm.weight" and not name.startswith(dead)}
