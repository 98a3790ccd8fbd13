"""Feeding a cache that tokens were dropped from: the caller's masks and positions, translated to the cache's
own length."""

from typing import Any

import torch

from qts_video.dropin.dropped import Dropped


def check_continuation(
    dropped: Dropped,
    past_length: int,
    fed: int,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the ``fed`` columns continue the sequence as the caller counts it, dropped
    tokens included.

    What it catches is a second turn whose whole prompt was given again: transformers takes the cache's length
    for the number of tokens seen, so it feeds as many old tokens again as were dropped.
    """
    if past_length < dropped.kept:
        raise ValueError(
            f"the cache was cropped to {past_length} tokens, into the {dropped.kept} of a shortened prefill; "
            "start a new one"
        )
    seen = past_length + dropped.removed
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        continues = attention_mask.shape[1] == seen + fed
    elif attention_mask is None and fed > 1 and position_ids is not None:
        first = position_ids.unsqueeze(0)[-1, :, 0] if position_ids.ndim == 2 else position_ids[-1, :, 0]
        continues = bool((first == dropped.callers_next_position + past_length - dropped.kept).all())
    else:
        continues = True
    if not continues:
        raise ValueError(
            f"the cache holds {past_length} of {seen} tokens ({dropped.removed} were dropped by selection), and "
            "these inputs do not continue it: give the new token ids alone, with an attention_mask over all "
            f"{seen} + {fed} columns (transformers 5; on 4.57 generate() can't continue a shortened cache, so start "
            "from a new one)"
        )


def translate_decoder_inputs(
    inputs: dict[str, Any], dropped: Dropped, past_length: int | None, positions_given: bool, rope_axes: int
) -> dict[str, Any]:
    """The decoder's keyword arguments for a shortened cache.

    Args:
        inputs: what the model passes to its decoder, q columns that continue the cache.
        dropped: what was dropped from the cache.
        past_length: filled slots of the cache; None where reading it would synchronise (a compileable cache
            in generate()).
        positions_given: whether the position ids come from the caller, who counts dropped tokens; else they
            are made here.
        rope_axes: of the positions: 1, or 3 (time, height, width).
    """
    tokens = inputs.get("inputs_embeds")
    tokens = inputs["input_ids"] if tokens is None else tokens
    batch, fed = tokens.shape[:2]
    if len(dropped.mask) != batch:
        raise ValueError(f"the cache was filled by a batch of {len(dropped.mask)}, got a batch of {batch}")
    translated = dict(inputs)
    mask = inputs.get("attention_mask")
    if past_length is not None:
        translated["attention_mask"] = dropped.mask_2d(mask, fed=past_length - dropped.kept + fed)
    if inputs.get("cache_position") is not None:
        translated["cache_position"] = inputs["cache_position"] - dropped.removed
    positions = inputs.get("position_ids")
    if positions_given and positions is not None:
        if dropped.shift is not None:
            translated["position_ids"] = positions - dropped.shift.unsqueeze(1)
    else:
        later = past_length - dropped.kept + fed if mask is None else mask.shape[1] - dropped.seen
        counted = (
            torch.ones(batch, later, dtype=torch.int64, device=tokens.device) if mask is None else mask[:, -later:]
        )
        rank = (counted.long().cumsum(1) - 1)[:, -fed:].clamp(min=0)
        following = dropped.next_position.unsqueeze(1) + rank
        translated["position_ids"] = following if rope_axes == 1 else following.expand(rope_axes, -1, -1)
    return translated
