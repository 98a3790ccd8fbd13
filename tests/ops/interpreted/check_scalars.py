"""rms_scale and soft_threshold in Triton's interpreter, against the reference in the same dtype and in float64."""

import pytest
import torch

from qts_kernels.ops.rms_scale import reference as rms_reference
from qts_kernels.ops.rms_scale import triton as rms
from qts_kernels.ops.soft_threshold import reference as threshold_reference
from qts_kernels.ops.soft_threshold import triton as threshold
from qts_kernels.testing import assert_within_budget, poisoned_memory, ragged_cu_seqlens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (70, 64), (2, 3, 5000), (1, 1), (0, 4), (4096,)], ids=str)
def test_rms_scale(dtype, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    with poisoned_memory():
        found = rms.rms_scale(x, 1e-6)
    assert_within_budget(found, rms_reference.rms_scale(x, 1e-6), rms_reference.rms_scale(x.double(), 1e-6), atol=1e-7)


def test_rms_scale_of_strided_rows_zeros_and_nan():
    x = torch.randn(9, 40)[:, ::2]
    x[2], x[3, 1] = 0, torch.nan
    exact = rms_reference.rms_scale(x.double(), 1e-6)
    assert_within_budget(rms.rms_scale(x, 1e-6), rms_reference.rms_scale(x, 1e-6), exact, atol=1e-7)


def scores(kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return {
        "normal": torch.randn(900, generator=generator),
        "softmax": torch.softmax(torch.randn(900, generator=generator) * 3, 0),
        "bimodal": torch.cat([torch.zeros(450), torch.ones(450)]),
        "heavy": torch.cat([torch.zeros(899), torch.full((1,), 1e4)]),
        "constant": torch.full((900,), 0.3),
    }[kind]


@pytest.mark.parametrize("kind", ["normal", "softmax", "bimodal", "heavy", "constant"])
@pytest.mark.parametrize("tau", [0.5, 0.1, 1e-3])
def test_soft_threshold(kind, tau):
    r, rho, cu = scores(kind), torch.tensor([0.1, 0.5, 0.3, 0.9]), ragged_cu_seqlens([300, 0, 599, 1])
    with poisoned_memory():
        found = threshold.soft_threshold(r, rho, cu, tau)
    eager = threshold_reference.soft_threshold(r, rho, cu, tau)
    exact = threshold_reference.soft_threshold(r.double(), rho.double(), cu, tau)
    # fp32 holds t to 6e-8 of its size.
    assert_within_budget(found, eager, exact, atol=2e-7 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("tau", [0.5, 0.1, 1e-3])
def test_soft_threshold_in_a_gap(tau):
    """Half the scores at 0, half at 5, half kept: by symmetry t is 2.5, though all gates are saturated there."""
    r = torch.cat([torch.zeros(500), torch.full((500,), 5.0)])
    found = threshold.soft_threshold(r, torch.tensor([0.5]), ragged_cu_seqlens([1000]), tau)
    torch.testing.assert_close(found, torch.tensor([2.5]), rtol=0, atol=2e-6)


def test_soft_threshold_at_the_ends_and_nan():
    cu = ragged_cu_seqlens([10, 10, 10, 10])
    r = torch.randn(40)
    r[35] = torch.nan
    found = threshold.soft_threshold(r, torch.tensor([0.0, 1.0, torch.nan, 0.5]), cu, 0.1)
    assert found[0] == torch.inf
    assert found[1] == -torch.inf
    assert found[2:].isnan().all()
