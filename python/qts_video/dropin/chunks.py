"""The video encoder run on a few frames at a time, so that the activations of a long video never lie in memory
together."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qts_video.adapters.base import Adapter

# Of single layers. Large, and read by no model behind its video encoder.
_LAYERS = ("hidden_states", "attentions")


def check_chunk_frames(frames: Any) -> None:
    """Raise TypeError unless ``frames`` is a whole number, ValueError unless it is at least 1."""
    if isinstance(frames, bool) or not isinstance(frames, int):
        raise TypeError(f"vision_chunk_frames must be a whole number of frames, got {type(frames).__name__} {frames!r}")
    if frames < 1:
        raise ValueError(f"vision_chunk_frames must be at least 1, got {frames}")


def encode_in_chunks(
    model: nn.Module, adapter: Adapter, frames: int, encode: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """``encode(*args, **kwargs)``, which is ``adapter.video_encoder``, run on at most ``frames`` frames at a time
    (``Adapter.video_chunks`` says what a frame is). Where there are no more, it is that one call.

    Hidden states and attentions of single layers, which some encoders return unasked, are dropped with each chunk;
    where the call or the tower's configuration asks for them, they are joined too.

    Raises ValueError where the pixels can't be cut, and for ``return_dict=False``.
    """
    arguments = arguments_of(encode, args, kwargs)
    chunks = adapter.video_chunks(model, arguments, frames)
    if len(chunks) == 1:
        return encode(*args, **kwargs)
    parts = adapter.parts(model)
    return_dict = arguments.get("return_dict")
    if not (getattr(parts.base.config, "return_dict", True) if return_dict is None else return_dict):
        raise ValueError("return_dict=False is not supported with vision_chunk_frames")
    config = getattr(parts.vision, "config", None)
    dropped = [
        name for name in _LAYERS if not (arguments.get(f"output_{name}") or getattr(config, f"output_{name}", False))
    ]
    outputs = [_without(dropped, encode(**chunk)) for chunk in chunks]
    return adapter.join_chunks(model, arguments, chunks, outputs)


def arguments_of(encode: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, in the order of the signature, additional keywords behind them."""
    bound = inspect.signature(encode).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def _without(names: list[str], output: Any) -> Any:
    if not isinstance(output, Mapping):
        return output
    return type(output)(**{name: value for name, value in output.items() if name not in names})
