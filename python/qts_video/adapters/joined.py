"""What a video encoder gave for some frames after the others, put together."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

# As transformers' ModelOutput has them: a tensor of every layer.
_OF_LAYERS = ("hidden_states", "attentions")


def join_fields(outputs: list[Any], **join: Callable[[list[Any]], Any]) -> Any:
    """One ModelOutput of several of a class, the frames of the second behind those of the first, and so on.

    Args:
        outputs: emptied on the way, so that what is joined need not lie in memory twice at the end.
        join: how fields are joined that are not tensors with the frames along their first axis.
    """
    kind, fields = type(outputs[0]), {name: [output[name] for output in outputs] for name in outputs[0]}
    outputs.clear()
    joined = {}
    for name in list(fields):
        parts = fields.pop(name)
        joined[name] = join.get(name, _join_layers if name in _OF_LAYERS else torch.cat)(parts)
    return kind(**joined)


def _join_layers(parts: list[tuple]) -> tuple:
    """Of every layer; None of one that was not recorded."""
    return tuple(None if layer[0] is None else torch.cat(layer) for layer in zip(*parts, strict=True))


def check_tensors(arguments: Mapping[str, Any], *known: str) -> None:
    """Raise ValueError where a call of a video encoder has a tensor that spans all frames besides those of the names
    ``known``."""
    others = [name for name, value in arguments.items() if isinstance(value, torch.Tensor) and value.ndim > 0]
    others = [name for name in others if name not in known]
    if others:
        raise ValueError(
            f"the video encoder was given {', '.join(others)} besides {' and '.join(known)}, which can't be cut into "
            "chunks: leave it out, or attach without vision_chunk_frames"
        )


def first_argument(arguments: Mapping[str, Any], shape: str) -> tuple[str, torch.Tensor]:
    """Name and value of the pixels, the first argument of a call of a video encoder.

    Raises ValueError unless they are a tensor with as many axes as ``shape`` ("[V, F, C, H, W]") names, and the only
    tensor.
    """
    name, pixels = next(iter(arguments.items()), ("pixel values", None))
    if not isinstance(pixels, torch.Tensor) or pixels.ndim != len(shape.split(",")):
        got = list(pixels.shape) if isinstance(pixels, torch.Tensor) else type(pixels).__name__
        raise ValueError(f"to be encoded in chunks of frames, {name} must have shape {shape}, got {got}")
    check_tensors(arguments, name)
    return name, pixels
