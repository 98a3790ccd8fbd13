"""InternLM2's decoder layers, which keep the projections of queries, keys and values in one matrix."""

import torch
from torch import nn


def is_fused(layer: nn.Module) -> bool:
    """Whether a decoder layer is InternLM2's: ``layer.attention`` with a fused ``wqkv`` and ``wo``, instead of
    ``layer.self_attn`` with ``q_proj``, ``k_proj`` and ``v_proj``."""
    return hasattr(getattr(layer, "attention", None), "wqkv")


def split_wqkv(
    attention: nn.Module, fused: torch.Tensor, dim: int = -1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split what has one row or column for each output of ``wqkv`` into those of the queries, keys and values.

    The outputs of ``wqkv`` are Hk groups, one a key head: each of its Hq / Hk query heads, its key, its value, of Dh
    numbers each ("h gs d" with gs = Hq / Hk + 2). A query head reads the keys of its own group, so what is split
    has the head order of q_proj, k_proj and v_proj.

    Args:
        attention: InternLM2's ``layer.attention``, with ``num_heads``, ``num_key_value_heads`` and ``head_dim``.
        fused: with (Hq + 2 Hk) * Dh entries along ``dim``: the output of ``attention.wqkv`` [..., (Hq + 2 Hk) * Dh]
            (not rotated yet), its weight [(Hq + 2 Hk) * Dh, D] with ``dim=0``, or its bias.
        dim: the axis that is split.

    Returns:
        q, k, v: like ``fused``, with Hq * Dh, Hk * Dh and Hk * Dh entries along ``dim``, head after head.

    Raises:
        ValueError: another number of entries along ``dim``.
    """
    groups, width = attention.num_key_value_heads, attention.head_dim
    queries = attention.num_heads // groups
    wanted = groups * (queries + 2) * width
    if fused.shape[dim] != wanted:
        raise ValueError(
            f"expected {wanted} entries along axis {dim}, for {attention.num_heads} query and {groups} key heads of "
            f"width {width}, got {list(fused.shape)}"
        )
    grouped = fused.movedim(dim, -1).unflatten(-1, (groups, queries + 2, width))
    parts = grouped.split([queries, 1, 1], dim=-2)
    q, k, v = (part.flatten(-3).movedim(-1, dim) for part in parts)
    return q, k, v
