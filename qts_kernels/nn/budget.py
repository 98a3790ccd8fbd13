"""How many tokens a question needs (QTSplus, arXiv 2511.11910)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qts_kernels._schemas import statistics_dtype


class BudgetHead(nn.Module):
    r"""Predicts the retention ratio of each segment, and from it the number of tokens to keep.

    .. math::
        p = r / \textstyle\sum r, \quad H = -\sum p \log p, \quad
        \rho = \rho_{min} + (\rho_{max} - \rho_{min}) \, \sigma(\mathrm{MLP}([\bar q; \log M; \max r; H])), \\
        n = \min(\max(1, \lceil \rho M \rceil), n_{max}, M)

    Everything is computed in fp32 whatever the parameters' dtype (float64 for float64).
    """

    def __init__(
        self, d_model: int, n_max: int = 2560, rho_min: float = 0.05, rho_max: float = 0.5, hidden: int = 256
    ) -> None:
        super().__init__()
        self.n_max, self.rho_min, self.rho_max = n_max, rho_min, rho_max
        self.mlp = nn.Sequential(nn.Linear(d_model + 3, hidden), nn.GELU(), nn.Linear(hidden, 1))

    def forward(
        self, question: Tensor, scores: Tensor, cu_question: Tensor, cu_vision: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """rho [S], n int64 [S] and the entropy H [S] in nats.

        Args:
            question: [L, D] packed rows. scores: r, [M] packed.
            cu_question, cu_vision: int32 [S+1]. Rows behind the last offset take no part.

        An empty question counts as zeros; where no score is above 0, H is 0. Without vision tokens n is 0, and rho is
        finite and means nothing. NaN scores make rho NaN, and n 1. Differentiable in question and scores.
        """
        dtype = statistics_dtype(scores)
        length, vision = cu_question.diff(), cu_vision.diff()
        mean = _segment("sum", question.to(dtype), cu_question) / length.clamp(min=1)[:, None]
        total = _segment("sum", scores, cu_vision)
        total = torch.where(total == 0, 1, total)
        # sum r log r, with the limit 0 and a finite gradient at r = 0
        weighted = _segment("sum", scores * scores.clamp(min=torch.finfo(dtype).tiny).log(), cu_vision)
        entropy = total.log() - weighted / total
        peak = _segment("max", scores, cu_vision)
        logarithm = vision.clamp(min=1).to(dtype).log()
        features = torch.cat([mean, torch.stack([logarithm, peak, entropy], 1)], 1)
        # Autocast would take the GEMMs to half precision, and the budget with them.
        with torch.autocast(scores.device.type, enabled=False):
            hidden = F.gelu(_linear(self.mlp[0], features))
            share = torch.sigmoid(_linear(self.mlp[2], hidden)[:, 0])
        rho = self.rho_min + (self.rho_max - self.rho_min) * share
        wanted = (rho.detach() * vision).ceil().nan_to_num(nan=1).long().clamp(1, self.n_max)
        return rho, torch.minimum(wanted, vision.long()), entropy


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _segment(reduce: str, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[T, ...] -> [S, ...]: the sum or maximum of each segment, 0 where it is empty. No atomics: the same bits on every
    run, whatever the other segments hold."""
    return torch.segment_reduce(x, reduce, offsets=cu_seqlens, axis=0, unsafe=True, initial=0)
