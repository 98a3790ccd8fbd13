"""1/rms in eager PyTorch: the specification."""

from torch import Tensor

from qts_kernels._schemas import statistics_dtype


def rms_scale(x: Tensor, eps: float) -> Tensor:
    """See ``qts_kernels.rms_scale``."""
    return (x.to(statistics_dtype(x)).square().mean(-1) + eps).rsqrt()
