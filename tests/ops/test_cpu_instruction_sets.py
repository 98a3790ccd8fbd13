"""soft_threshold and the re-encoder on the CPU, every instruction set. Run as a script it makes the sweep alone, for
the instruction set that QTS_CPU_ISA names."""

import sys

import pytest
import torch
from instruction_sets import check_sweep

from qts_kernels import _native
from qts_kernels.ops.reencode import reference
from qts_kernels.ops.soft_threshold.reference import soft_threshold
from qts_kernels.testing import assert_within_budget, poisoned_memory, ragged_cu_seqlens

pytestmark = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))


def check(name, *args):
    """The native op and the reference against the reference in fp64."""
    with poisoned_memory():
        ours = getattr(torch.ops.qts_kernels_native, name).default(*args)
    eager = getattr(reference, name)
    exact = eager(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args))
    results = [x if isinstance(x, tuple) else (x,) for x in (ours, eager(*args), exact)]
    for a, b, c in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert_within_budget(a, b, c)


def sweep():
    generator = torch.Generator().manual_seed(0)
    indices = torch.tensor([8, -1, 0, 8, 3])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (3, 4, 5, 16, 63, 64, 257):
            x, y, g = (2 * torch.randn(3, 9, width, generator=generator)).to(dtype)
            weight, rstd = y[4], reference.add_rms_norm(x, 0 * x, None, 1e-6)[2]
            for w in (weight, None):
                check("gather_add_rms_norm", x, indices, y[:5], w, 1e-6)
                check("add_rms_norm", x, y, w, 1e-6)
                check("rms_norm_backward", g, y, x, w, rstd)
            check("gather_add_rms_norm", x[:, : width // 2 + 1], indices, None, None, 1e-6)
            check("bias_gelu", x, weight)
            check("bias_gelu_backward", g, x, weight)
        special = torch.tensor([[0.0, -0.0, torch.inf, torch.nan, -20.0, 20.0, 1e-6]]).to(dtype)
        got = torch.ops.qts_kernels_native.bias_gelu.default(special, torch.zeros(7, dtype=dtype))[0].tolist()
        assert got[:3] == [0, 0, torch.inf]
        assert got[3] != got[3]
        assert got[4] == 0
        assert got[5] == 20
    lengths = [1, 3, 16, 37, 900]
    scores, cu = torch.randn(sum(lengths), generator=generator), ragged_cu_seqlens(lengths)
    for tau in (1e-3, 0.1, 10.0):
        for share in (1e-4, 0.3, 0.9):
            rho = torch.full((len(lengths),), share)
            ours = torch.ops.qts_kernels_native.soft_threshold.default(scores, rho, cu, tau)
            exact = soft_threshold(scores.double(), rho.double(), cu, tau)
            # Twice the rounding of t, and of the scores it is compared with.
            atol = 2 * torch.finfo(torch.float32).eps * max(exact.abs().max().item(), 4.0) + 1e-6 * tau
            assert (ours - exact).abs().max() <= atol


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_within_budget(isa):
    check_sweep(isa, __file__)


if __name__ == "__main__":
    reason = _native.absent("_C")
    if reason is not None:
        sys.exit(reason)
    sweep()
