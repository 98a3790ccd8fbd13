"""Absolute time as a vector: what lets the language model see when a kept token was."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qts_kernels._schemas import statistics_dtype

SHORTEST, LONGEST = 0.5, 4 * 3600.0
"""Seconds: the shortest and the longest period."""


class TimeEmbedding(nn.Module):
    r"""W [sin(2 pi t / P_k); cos(2 pi t / P_k)], periods P_k spaced evenly in the logarithm from 0.5 s to 4 h.

    W starts at zero, so that a selector trained without time gives what it gave, until W is trained.
    """

    def __init__(self, d_model: int, periods: int = 64) -> None:
        super().__init__()
        self.periods = periods
        self.proj = nn.Linear(2 * periods, d_model, bias=False)
        nn.init.zeros_(self.proj.weight)

    def forward(self, timestamps: Tensor) -> Tensor:
        """Seconds [N], floating -> [N, D] in the dtype of the weight."""
        # Computed, not a buffer: a buffer would be rounded when the module goes to half precision. In float64, because
        # after hours the fraction of a cycle is all that is left of the last digits.
        exponent = torch.linspace(
            math.log(SHORTEST), math.log(LONGEST), self.periods, dtype=torch.float64, device=timestamps.device
        )
        cycles = timestamps.double()[:, None] / exponent.exp()
        phase = (2 * math.pi * (cycles - cycles.floor())).to(statistics_dtype(self.proj.weight))
        features = torch.cat([phase.sin(), phase.cos()], 1)
        return F.linear(features.to(self.proj.weight.dtype), self.proj.weight)
