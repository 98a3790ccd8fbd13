"""The C++ code of rms_scale: every instruction set, tails and strides against the reference. Run as a script it makes
the sweep alone, for the instruction set that QTS_CPU_ISA names."""

import sys

import pytest
import torch
from instruction_sets import check_sweep

from qts_kernels import _native
from qts_kernels.ops.rms_scale import reference
from qts_kernels.testing import assert_within_budget, poisoned_memory

pytestmark = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def native(x, eps=1e-6):
    with poisoned_memory():
        return torch.ops.qts_kernels_native.rms_scale.default(x, eps)


def check(x, eps=1e-6):
    got = native(x, eps)
    assert got.dtype == torch.float32
    assert_within_budget(got, reference.rms_scale(x, eps), reference.rms_scale(x.double(), eps))


def sweep():
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for shape in ((1,), (0, 7), (3, 1), (2, 3, 5), (5, 16), (4, 63), (3, 64), (7, 257), (2, 3584)):
            check((3 * torch.randn(shape, generator=generator)).to(dtype))
        wide = torch.randn(9, 200, generator=generator).to(dtype)
        check(wide[:, 3:150])
        check(wide.t())
        check(wide[:, ::2])
        check(torch.zeros(2, 5, dtype=dtype))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_within_budget(isa):
    check_sweep(isa, __file__)


def test_threads_do_not_change_a_bit():
    x = torch.randn(1000, 1030)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = native(x)
        torch.set_num_threads(2)
        assert torch.equal(native(x), one)
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinity_stay_in_their_row():
    x = torch.ones(3, 70)
    x[0, 69], x[1, 2] = float("nan"), float("inf")
    got = native(x)
    assert got[0].isnan()
    assert got[1] == 0
    assert torch.isclose(got[2], torch.tensor(1.0))


if __name__ == "__main__":
    reason = _native.absent("_C")
    if reason is not None:
        sys.exit(reason)
    sweep()
