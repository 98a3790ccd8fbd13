"""Run a model in the middle of its own prefill."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# What models with M-RoPE remember of a prefill, for the positions of the tokens that they generate.
_REMEMBERED = "rope_deltas"


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leave with the positions of a running ``generate()`` as they were: a generate() inside sets its own."""
    before = [(module, module.__dict__[_REMEMBERED]) for module in model.modules() if _REMEMBERED in module.__dict__]
    try:
        yield
    finally:
        for module, value in before:
            setattr(module, _REMEMBERED, value)
