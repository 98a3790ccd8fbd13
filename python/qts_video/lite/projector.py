"""The three projectors between vision features and the small language model, by the names of the released weights."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from qts_video.lite.config import LiteConfig


def build_projector(config: LiteConfig) -> nn.Module:
    """The projector of ``config.family``: vision features -> [tokens, hidden_size]."""
    return {"llava": LlavaProjector, "qwen": QwenMerger, "internvl": InternVLProjector}[config.family](config)


class LlavaProjector(nn.Sequential):
    """LLaVA: [frames, h*w, vision_size] of square frames -> [frames * ceil(h/2) * ceil(w/2), hidden_size].

    Linear, GELU, Linear on every patch, then a bilinear resize of each projected frame.
    """

    def __init__(self, config: LiteConfig) -> None:
        width = config.hidden_size
        super().__init__(nn.Linear(config.vision_size, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        frames, patches, _ = features.shape
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"expected square frames of patches, got {patches} patches a frame")
        grid = super().forward(features).view(frames, side, side, -1).permute(0, 3, 1, 2)
        pooled = F.interpolate(grid, size=(math.ceil(side / 2), math.ceil(side / 2)), mode="bilinear")
        return pooled.permute(0, 2, 3, 1).flatten(0, 2)


class QwenMerger(nn.Module):
    """Qwen: [tokens, merge^2, vision_size] -> [tokens, hidden_size]: a norm on each patch, then Linear, GELU, Linear
    on the patches of a token side by side."""

    def __init__(self, config: LiteConfig) -> None:
        super().__init__()
        norm = nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm
        wide = config.vision_size * config.merge**2
        self.ln_q = norm(config.vision_size, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, config.hidden_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.ln_q(features).flatten(1))


class InternVLProjector(nn.Sequential):
    """InternVL: [tiles, tokens, vision_size] after the pixel shuffle -> [tiles * tokens, hidden_size]: LayerNorm,
    Linear, GELU, Linear."""

    def __init__(self, config: LiteConfig) -> None:
        wide, width = config.vision_size, config.hidden_size
        super().__init__(nn.LayerNorm(wide), nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features).flatten(0, 1)
