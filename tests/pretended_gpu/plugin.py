"""``pytest -p pretended_gpu.plugin``: tests for a GPU run on a pretended one.

It shows what Python does with a card: tensors left on the other device, calls that wait for the card, graphs that hold
a number of their capture, and the launchers of the Triton kernels, which run in its interpreter. It can't show what the
card itself does.
"""

import os
from collections.abc import Callable

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime import interpreter
from triton_interpreter import correct_interpreter

from pretended_gpu import cuda_module
from pretended_gpu.tensors import GPU, PretendedTensor
from qts_kernels import _native, backends

INTERPRETED = 4000, 40_000
"""Elements of an op's arguments up to which it runs the card's implementation, the second number where waiting is
forbidden. With more, Triton's interpreter would take seconds: the CPU's runs."""


def unwrapped(tree: object) -> object:
    return tree_map_only(PretendedTensor, lambda x: x.inner, tree)


def launch(self: interpreter.GridExecutor, *args, **kwargs) -> None:
    args, kwargs = unwrapped((args, kwargs))
    with _disable_current_modes():
        _launch(self, *args, **kwargs)
    GPU.record(lambda: _launch(self, *args, **kwargs))


def implementation(op: str, x: torch.Tensor) -> Callable:
    chosen = _implementation(op, x)
    if not isinstance(x, PretendedTensor) or backends._forced or x.dtype == torch.float64:
        return chosen

    def run(*args):
        if sum(a.numel() for a in tree_leaves(args) if isinstance(a, torch.Tensor)) <= INTERPRETED[GPU.forbids_waiting]:
            return chosen(*args)
        args = unwrapped(args)
        with _disable_current_modes():
            out = _implementation(op, x.inner)(*args)
        GPU.record(lambda: _implementation(op, x.inner)(*args), out)
        return tree_map_only(torch.Tensor, PretendedTensor, out)

    return run


def install() -> None:
    """From here to the process's end, torch has one pretended card."""
    correct_interpreter()
    torch.__future__.set_swap_module_params_on_conversion(True)
    cuda_module.install()
    interpreter.GridExecutor.__call__ = launch
    backends.implementation = implementation
    _native.absent = lambda extension: _absent("_C")
    GPU.__enter__()


_launch, _implementation, _absent = interpreter.GridExecutor.__call__, backends.implementation, _native.absent
# When it is imported, which is before any conftest.py asks whether there is a card.
install()
