"""State dicts in and out: the released selector's names, and a folder of our own."""

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from qts_kernels._version import __version__
from qts_kernels.nn.scoring import RelevanceLayer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
Module = TypeVar("Module", bound=nn.Module)


def adapt_released_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A load_state_dict pre-hook of ``QTSplus``: drop what is dead in the last scoring layer, and start an absent time
    embedding and an absent running mean of rho at zero. Everything else is left to the usual strict check."""
    state.setdefault(f"{prefix}rho_mean", torch.zeros_like(module.rho_mean))
    last = f"{prefix}scoring_layers.{len(module.scoring_layers) - 1}."
    for name in RelevanceLayer.dead:
        state.pop(last + name, None)
    if module.time_embedding is not None and not any(key.startswith(f"{prefix}time_embedding.") for key in state):
        for name, parameter in module.time_embedding.named_parameters():
            state[f"{prefix}time_embedding.{name}"] = torch.zeros_like(parameter)


def save_module(module: nn.Module, config: dict[str, Any], folder: str | Path) -> None:
    """Write ``config``, with the class and the version, and the state dict."""
    from safetensors.torch import save_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {"model_type": model_type(type(module)), "qts_kernels_version": __version__, **config}
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    save_model(module, str(folder / WEIGHTS), metadata={"format": "pt"})


def load_module(cls: type[Module], folder: str | Path) -> Module:
    """Build ``cls`` from what ``save_module`` wrote, in eval mode and in the dtype it was saved in."""
    from safetensors.torch import load_file

    config = read_config(folder)
    if config.get("model_type") != model_type(cls):
        raise ValueError(f"{folder} holds model_type {config.get('model_type')!r}, expected {model_type(cls)!r}")
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}")
    options = {name: value for name, value in config.items() if name not in ("model_type", "qts_kernels_version")}
    module = cls(**options)
    state = load_file(str(weights))
    module.load_state_dict(state, assign=True)
    return module.eval()


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a folder. Raises FileNotFoundError where there is none."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}")
    return json.loads(path.read_text())


def model_type(cls: type[nn.Module]) -> str:
    """How our ``config.json`` names a module class."""
    return f"qts_kernels.{cls.__name__}"
