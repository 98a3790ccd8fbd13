"""What a budget costs (QTSplus, arXiv 2511.11910)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class BudgetLosses:
    """Of every video [V], weighted; the loss adds their means to the cross entropy."""

    squared: Tensor
    """lambda_squared (rho M / n_max)^2"""
    linear: Tensor
    """lambda_linear rho M / n_max"""
    stability: Tensor
    """lambda_stability (rho - running mean)^2; 0 while there is no running mean."""

    def total(self) -> Tensor:
        return self.squared + self.linear + self.stability


def budget_losses(
    rho: Tensor, n_expected: Tensor, n_max: int, rho_mean: Tensor, weights: tuple[float, float, float]
) -> BudgetLosses:
    """The three losses, for rho [V] and rho M [V], the running mean of rho (0: none yet) and the three lambdas."""
    squared, linear, stability = weights
    share = n_expected / n_max
    deviation = (rho - rho_mean.to(rho.dtype)).square().where(rho_mean > 0, 0)
    return BudgetLosses(squared * share.square(), linear * share, stability * deviation)
