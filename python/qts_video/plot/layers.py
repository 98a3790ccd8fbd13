"""Layers as the command line names them."""

import argparse
import re


def layer_ranges(text: str) -> tuple[slice, ...]:
    """``--layers``: "all", numbers from 0, and ranges a:b without b, separated by commas.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if text == "all":
        return (slice(None),)
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)|(\d*):(\d*)", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"expected 'all', numbers as in 0,4,8 or a range as in 10:20, got {text}")
        one, first, end = match.groups()
        if one is not None:
            ranges.append(slice(int(one), int(one) + 1))
        else:
            ranges.append(slice(int(first) if first else None, int(end) if end else None))
    return tuple(ranges)


def resolve_layers(ranges: tuple[slice, ...] | None, total: int, *, default: int) -> list[int]:
    """The layers of a model with ``total`` of them, ascending; None: ``default`` ones, spread over the depth.

    Raises:
        ValueError: a layer that the model has not, or an empty range.
    """
    if ranges is None:
        shown = min(default, total)
        return sorted({(2 * i + 1) * total // (2 * shown) for i in range(shown)})
    layers: set[int] = set()
    for part in ranges:
        first, end = part.start or 0, total if part.stop is None else part.stop
        if first >= end:
            raise ValueError(f"layers {first}:{end} are none")
        if end > total:
            raise ValueError(f"layer {end - 1}: the model has layers 0 to {total - 1}")
        layers.update(range(first, end))
    return sorted(layers)
