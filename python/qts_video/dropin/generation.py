"""What the drop-in needs to know of a ``generate()`` call, which takes inputs away before the model sees
them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Both crop or fill the cache to a length counted in tokens of the whole prompt, which a shortened cache does
# not have.
_UNSUPPORTED = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding (prompt lookup)",
    "assistant_early_exit": "assisted decoding (early exit)",
    "prefill_chunk_size": "prefill in chunks",
}


@dataclass
class Generation:
    """A ``generate()`` call, from its start to its end."""

    arguments: Mapping[str, Any]
    """Everything it was called with, by name."""
    input_ids: torch.Tensor | None
    """[B, L], before samples are repeated for beams or several sequences."""
    has_video: bool
    """Whether ``input_ids`` hold a video."""
    vision: torch.Tensor | None = None
    """What went into the projector, where generate() encodes videos before the model runs (transformers 5.18 on)."""

    def copies(self, batch: int) -> int:
        """How often every sample is repeated in a ``batch`` that the model is given."""
        samples = batch if self.input_ids is None else len(self.input_ids)
        if batch % samples != 0:
            raise ValueError(f"expected each of {samples} samples equally often, got a batch of {batch}")
        return batch // samples


def read_generation(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], holds_video: Callable[[torch.Tensor], bool]
) -> Generation:
    """What ``model.generate(*args, **kwargs)`` was called with."""
    arguments = arguments_by_name(type(model).generate, model, args, kwargs)
    ids = arguments.get("input_ids")
    ids = arguments.get("inputs") if ids is None else ids
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        ids = None
    return Generation(arguments, ids, has_video=ids is not None and holds_video(ids))


def check_generate(generation: Generation, default_config: Any) -> None:
    """Raise ValueError where a prompt with videos is generated from in a way that selection does not
    support."""
    if not generation.has_video:
        return
    arguments = generation.arguments
    for name, what in _UNSUPPORTED.items():
        given = arguments.get(name)
        for config in (arguments.get("generation_config"), default_config):
            given = getattr(config, name, None) if given is None else given
        if given is not None:
            raise ValueError(f"{what} ({name}) is not supported while a selector is attached; leave it out")


def arguments_by_name(
    function: Callable[..., Any], instance: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of ``instance``'s method ``function`` by name, the additional keywords among them."""
    signature = inspect.signature(function)
    bound = signature.bind_partial(instance, *args, **kwargs)
    named = dict(list(bound.arguments.items())[1:])  # without self
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            named |= named.pop(name, {})
    return named
