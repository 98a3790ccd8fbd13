"""Rotated queries and keys of a decoder's layers, by its own forward pass, which ends behind the last layer that is
asked for."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

Visit = Callable[[int, torch.Tensor, torch.Tensor, float], None]
"""(layer, q [B, L, H, Dh], k [B, L, Hkv, Dh], scale of the logits)"""
_INTERFACE = "qts_video_early_exit"


class _Captured(Exception):
    """Leaves an attention module with the rotated queries and keys that it made."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.query, self.key, self.scale = query, key, scale


class _Left(Exception):
    """Leaves the decoder behind the last layer that is asked for."""


def queries_and_keys(
    decoder: nn.Module, inputs: dict[str, Any], layers: Sequence[int]
) -> dict[int, tuple[torch.Tensor, torch.Tensor, float]]:
    """Rotated queries and keys of ``layers``, in one pass. See ``visit_attention``, which keeps one layer at a time.

    Returns:
        Of each layer, q [B, L, H, Dh], k [B, L, Hkv, Dh] and the scale of the logits.
    """
    captured = {}
    visit_attention(decoder, inputs, layers, lambda layer, *found: captured.update({layer: found}))
    return captured


def visit_attention(decoder: nn.Module, inputs: dict[str, Any], layers: Sequence[int], visit: Visit) -> None:
    """Run the decoder's own layers 0 .. max(layers) - 1, and of each of ``layers`` give ``visit`` the rotated queries
    and keys. Nothing behind those of the last one is computed; no weight is copied, and no cache is filled.

    Attention of the layers that run is the model's own (SDPA, flash, eager). Differentiable where gradients are on,
    but for checkpointed layers.

    Args:
        decoder: a language model without its head: ``layers[i].self_attn`` of transformers' attention interface (Qwen2,
            Qwen2.5-VL, Qwen3-VL), or InternLM2's ``layers[i].attention``.
        inputs: its keyword arguments. Give an explicit attention_mask [B, L]: without one, gaps in the positions are
            taken for the borders of packed sequences.
        layers: which, counted from 0; any order.
        visit: called once a layer, in ascending order.

    Raises:
        ValueError: no layer, a layer that the decoder does not have, or one with sliding-window attention, whose
            softmax runs over a part of the keys.
        TypeError: layers of another kind.
        RuntimeError: the decoder did not come by its own layers.
    """
    wanted = sorted(set(layers))
    check_layers(decoder, wanted)
    visited: list[int] = []
    with ExitStack() as undo:
        for layer in wanted:
            attention = _attention(decoder.layers[layer])
            hook = attention.register_forward_pre_hook(_visitor(layer, wanted[-1], visit, visited), with_kwargs=True)
            undo.callback(hook.remove)
            for module in (decoder.layers[layer], attention):  # a compiled module would not see a hook that is new
                undo.enter_context(_replaced(module.__dict__, "_compiled_call_impl", None))
        # The outputs are named because a config that asks for hidden states makes transformers 4 swap forwards that it
        # would not put back.
        with suppress(_Left):
            decoder(**inputs, use_cache=False, output_attentions=False, output_hidden_states=False)
    if visited != wanted:
        raise RuntimeError(
            f"the decoder ran past the attention of layers {sorted(set(wanted) - set(visited))}: was it compiled as a "
            "whole, or a forward replaced? Compile its layers one by one (layer.compile())"
        )


def check_layers(decoder: nn.Module, layers: Iterable[int]) -> None:
    """Raise, as ``visit_attention`` says, unless ``layers`` of ``decoder`` can be visited."""
    layers, number = list(layers), len(decoder.layers)
    if not layers:
        raise ValueError("expected at least one layer, got none")
    for layer in layers:
        if not 0 <= layer < number:
            raise ValueError(f"expected a layer of 0 .. {number - 1}, as {type(decoder).__name__} has, got {layer}")
        attention = _attention(decoder.layers[layer])
        if getattr(attention, "sliding_window", None) is not None:
            raise ValueError(
                f"layer {layer} of {type(decoder).__name__} has sliding-window attention: its text does not see the "
                "whole video; choose another layer"
            )


def _attention(layer: nn.Module) -> nn.Module:
    for name in ("self_attn", "attention"):
        if hasattr(layer, name):
            return getattr(layer, name)
    raise TypeError(f"expected decoder layers with a self_attn or attention, got {type(layer).__name__}")


def _visitor(layer: int, last: int, visit: Visit, visited: list[int]) -> Callable[..., None]:
    def before(attention: nn.Module, args: tuple, kwargs: dict) -> None:
        visit(layer, *_capture(attention, args, kwargs))
        visited.append(layer)
        if layer == last:
            raise _Left

    return before


def _capture(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Let ``attention`` project, normalise and rotate its queries and keys, and take them from it where it would
    attend. Its values are not made."""
    if hasattr(attention, "wqkv"):
        return _internlm2(attention, *args, **kwargs)
    _register()
    values = _NoValues(attention.head_dim)
    redirected = _Redirected(attention.config)
    with _replaced(attention._modules, "v_proj", values), _replaced(attention.__dict__, "config", redirected):
        try:
            attention.forward(*args, **kwargs)
        except _Captured as captured:
            return captured.query.transpose(1, 2), captured.key.transpose(1, 2), captured.scale
    raise TypeError(f"{type(attention).__name__} does not attend by transformers' attention interface")


def _internlm2(
    attention: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The same of InternLM2's attention, which has one projection for queries, keys and values, and no interface."""
    from qts_video.adapters.internlm2 import split_wqkv

    q, k, v = (
        part.unflatten(-1, (-1, attention.head_dim)) for part in split_wqkv(attention, attention.wqkv(hidden_states))
    )
    cos, sin = (table.unsqueeze(2) for table in attention.rotary_emb(v.transpose(1, 2), position_ids))
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin, attention.head_dim**-0.5


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], -1)


class _Redirected:
    """A config that names our attention function, and is the model's in everything else."""

    _attn_implementation = _INTERFACE

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _NoValues(nn.Module):
    """Stands where the values' projection is: one head of any numbers."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[..., : self.head_dim]


def _attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, scaling: float, **kwargs: Any):
    raise _Captured(query, key, scaling)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_INTERFACE, _attend)


@contextmanager
def _replaced(entries: dict[str, Any], name: str, value: Any):
    """``entries[name]`` is ``value`` in this context, and what it was (or absent) behind it."""
    missing = object()
    before = entries.get(name, missing)
    entries[name] = value
    try:
        yield
    finally:
        if before is missing:
            del entries[name]
        else:
            entries[name] = before
