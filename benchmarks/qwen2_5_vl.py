"""A Qwen2.5-VL of any size with random weights, behind a vision tower that costs next to nothing."""

from torch import nn
from whole_models import Size, build_qwen, made_on


def build(layers: int, width: int, heads: int, kv_heads: int, inner: int, device: str) -> nn.Module:
    """In bfloat16 on a GPU, else float32; the ids of its placeholders are those of ``whole_models``."""
    size = Size(layers, width, heads, kv_heads, inner, vocabulary=1024, vision=(32, 1, 2, 32), side=0)
    return made_on(device, lambda: build_qwen(size))
