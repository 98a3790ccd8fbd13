"""resize_frames and merge_tokens on the CPU, every instruction set. Run as a script it makes the sweep alone, for the
instruction set that QTS_CPU_ISA names."""

import sys

import pytest
import torch
from instruction_sets import check_sweep

from qts_kernels import _native
from qts_kernels.ops.merge_tokens import reference as merge
from qts_kernels.ops.resize_frames import reference as resize
from qts_kernels.testing import assert_within_budget, poisoned_memory

pytestmark = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))


def sweep():
    sizes = torch.tensor([(3, 2), (0, 1), (7, 9), (1, 1), (2, 5)])
    cu = torch.tensor([0, 6, 6, 69, 70, 80], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (1, 3, 16, 17, 63, 1100):
            frames = torch.randn(5, 6, 5, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
            for mode in ("bilinear", "adaptive_avg", "linspace"):
                for op, x, rest in (
                    ("resize_frames", frames, (80, mode)),
                    ("resize_frames_backward", frames.view(-1, columns)[:80], (6, 5, mode)),
                ):
                    with poisoned_memory():
                        ours = getattr(torch.ops.qts_kernels_native, op)(x, sizes, cu, *rest)
                    eager = getattr(resize, op)
                    assert ours.dtype == dtype
                    assert_within_budget(ours, eager(x, sizes, cu, *rest), eager(x.double(), sizes, cu, *rest))
    counts, cu = torch.tensor([29, 15, 9, 0, 3]), torch.tensor([0, 29, 44, 53, 53, 56], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for columns in (1, 17, 63, 1100):
            frames = torch.randn(5, 29, columns, generator=torch.Generator().manual_seed(columns)).to(dtype)
            frames[:, 3:5] = frames[:, 8:10]  # equal tokens, among other neighbours
            sizes = torch.rand(5, 29, generator=torch.Generator().manual_seed(0)) + 0.5
            with poisoned_memory():
                ours = torch.ops.qts_kernels_native.merge_tokens(frames, counts, cu, sizes, 60, False)
            eager = merge.merge_tokens(frames, counts, cu, sizes, 60, False)
            exact = merge.merge_tokens(frames.double(), counts, cu, sizes.double(), 60, False)
            if columns > 1:  # where all similarities are 1 or -1 to rounding, it decides
                assert torch.equal(ours[2], exact[2])
                for i in (0, 1, 3):
                    assert_within_budget(ours[i], eager[i], exact[i])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_within_budget(isa):
    check_sweep(isa, __file__)


if __name__ == "__main__":
    reason = _native.absent("_C")
    if reason is not None:
        sys.exit(reason)
    sweep()
