"""What compute-sanitizer watches holds every op."""

import every_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from qts_kernels._schemas import SCHEMAS


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, _, name = function.name().partition("::")
        if space == "qts_kernels":
            self.ops.add(name)
        return function(*args, **(kwargs or {}))


def test_every_op_runs():
    with Called() as called:
        every_kernel.run("cpu")
    assert called.ops == set(SCHEMAS)
