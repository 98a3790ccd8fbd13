"""Reference layers and budgets by model, as published (arXiv 2506.00993 and its follow-up for Qwen3-VL)."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Default:
    layer: int
    """The reference layer, counted from 0."""
    budget: int | None
    """Video tokens to keep of a sample, newlines included; None where nothing is published."""


DEFAULTS: dict[tuple[str, int, int], Default] = {
    ("llava_onevision", 28, 3584): Default(19, 6720),
    ("llava_onevision", 80, 8192): Default(60, None),
    ("internvl_chat", 32, 4096): Default(15, 8256),
    ("internvl", 32, 4096): Default(15, 8256),
    ("internvl_chat", 80, 8192): Default(60, None),
    ("internvl", 80, 8192): Default(60, None),
    ("qwen2_5_vl", 28, 3584): Default(20, 7040),
    ("qwen2_5_vl", 80, 8192): Default(60, None),
    ("qwen3_vl", 36, 4096): Default(24, None),
    ("qwen3_vl", 64, 5120): Default(48, None),
}
"""By ``config.model_type`` of the model, and layers and width of its language model."""


def default_layer(model: nn.Module, decoder: nn.Module) -> int:
    """The published reference layer. Raises ValueError, saying how to find it, where there is none."""
    found = _find(model, decoder)
    if found is None:
        raise ValueError(
            f"no reference layer is known for {_describe(model, decoder)}: find it with 'qts plot recall' and give "
            "FlexSelect(layer=...)"
        )
    return found.layer


def default_budget(model: nn.Module, decoder: nn.Module) -> int:
    """The published budget. Raises ValueError where there is none."""
    found = _find(model, decoder)
    if found is None or found.budget is None:
        raise ValueError(
            f"no budget is known for {_describe(model, decoder)}: give FlexSelect(max_tokens=...) or retention_ratio"
        )
    return found.budget


def _find(model: nn.Module, decoder: nn.Module) -> Default | None:
    return DEFAULTS.get((model.config.model_type, decoder.config.num_hidden_layers, decoder.config.hidden_size))


def _describe(model: nn.Module, decoder: nn.Module) -> str:
    config = decoder.config
    return f"{model.config.model_type} with {config.num_hidden_layers} layers of width {config.hidden_size}"
