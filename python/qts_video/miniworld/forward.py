"""The model's forward on packed rows: its own modules and weights, the frames of all films in one batch.

transformers' vision tower attends one step after another, in a loop; here all steps, which are of one size, go at once.
"""

from typing import Any

import torch
from torch.nn import functional

from .packing import PREFIX, Batch
from .world import CELLS, MERGE


def normalise(patches: torch.Tensor, processor: Any) -> torch.Tensor:
    """uint8 patches as the video processor gives them, in float32."""
    videos = processor.video_processor
    mean, std = (
        torch.tensor(value, dtype=torch.float32, device=patches.device).repeat_interleave(patches.shape[-1] // 3)
        for value in (videos.image_mean, videos.image_std)
    )
    return (patches.float() - mean * 255) / (std * 255)


def encode_steps(visual: Any, patches: torch.Tensor) -> torch.Tensor:
    """[N, patches, values] -> [N, tokens, D]: what ``visual`` makes of N time steps."""
    steps, count = patches.shape[:2]
    weight = visual.patch_embed.proj.weight
    hidden = functional.linear(patches, weight.flatten(1))
    cos, sin = _rotary(visual, hidden)
    for block in visual.blocks:
        attention = block.attn
        q, k, v = attention.qkv(block.norm1(hidden)).view(steps, count, 3, attention.num_heads, -1).unbind(2)
        q, k = (x * cos + _rotate_half(x) * sin for x in (q, k))
        mixed = functional.scaled_dot_product_attention(
            *(x.transpose(1, 2).to(v.dtype) for x in (q, k, v)),
        )
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(steps, count, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.reshape(steps * count, -1)).view(steps, count // MERGE**2, -1)


def _rotary(visual: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [patches, 1, head width] of a step's patches, in the order of the processor."""
    place = torch.arange(CELLS * MERGE, device=like.device).view(CELLS, MERGE)
    rows = place[:, None, :, None].expand(CELLS, CELLS, MERGE, MERGE).flatten()
    columns = place[None, :, None, :].expand(CELLS, CELLS, MERGE, MERGE).flatten()
    half = visual.blocks[0].attn.head_dim // 2
    frequency = 10000.0 ** -(torch.arange(0, half, 2, device=like.device).float() / half)
    angles = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], 1)
    angles = torch.cat([angles, angles], 1)[:, None]
    return angles.cos(), angles.sin()


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def answer_states(model: Any, batch: Batch, vision: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[B, Q, 2, D] in ``dtype``: the last hidden states where each question's answer is said, and behind it.

    The decoder's own weights in fewer, larger steps than transformers': the projections in one, attention as two
    products, the last feed-forward at the rows that are asked alone.

    Args:
        vision: [B, N, D], the film's tokens.
    """
    decoder = model.model.language_model
    words = decoder.embed_tokens(batch.ids)
    end = PREFIX + vision.shape[1]
    hidden = torch.cat([words[:, :PREFIX], vision, words[:, end:]], 1).to(dtype)
    cos, sin = (x[:, None].to(dtype) for x in decoder.rotary_emb(hidden, batch.positions))
    hidden_keys = hidden.new_zeros(batch.mask.shape[2:]).masked_fill(~batch.mask[0, 0], float("-inf"))
    for number, layer in enumerate(decoder.layers):
        hidden = hidden + _attend(layer, hidden, cos, sin, hidden_keys)
        if number == len(decoder.layers) - 1:
            columns = torch.stack([batch.ask, batch.ask + 1], -1).flatten(1)
            hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        normed = _normed(hidden, layer.post_attention_layernorm)
        gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight.to(dtype) for name in ("gate", "up", "down"))
        hidden = hidden + functional.linear(
            functional.silu(functional.linear(normed, gate)) * functional.linear(normed, up), down
        )
    return _normed(hidden, decoder.norm).view(*batch.ask.shape, 2, -1)


def _attend(
    layer: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, hidden_keys: torch.Tensor
) -> torch.Tensor:
    attention = layer.self_attn
    samples, length, width = hidden.shape
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight, bias = (torch.cat([getattr(part, name) for part in parts]).to(hidden) for name in ("weight", "bias"))
    split = functional.linear(_normed(hidden, layer.input_layernorm), weight, bias)
    q, k, v = split.view(samples, length, 3, -1, attention.head_dim).permute(2, 0, 3, 1, 4)
    q, k = (x * cos + _rotate_half(x) * sin for x in (q, k))
    q, k, v = (x.reshape(-1, length, attention.head_dim) for x in (q, k, v))
    logits = torch.baddbmm(hidden_keys.expand(len(q), -1, -1), q, k.transpose(1, 2), alpha=attention.head_dim**-0.5)
    mixed = (logits.softmax(-1) @ v).view(samples, -1, length, attention.head_dim)
    return functional.linear(mixed.transpose(1, 2).reshape(samples, length, width), attention.o_proj.weight.to(hidden))


def _normed(hidden: torch.Tensor, norm: Any) -> torch.Tensor:
    return functional.rms_norm(hidden, hidden.shape[-1:], norm.weight.to(hidden), norm.variance_epsilon)
