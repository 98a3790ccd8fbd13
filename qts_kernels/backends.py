"""Which implementation serves which op on which device; force one in tests; a report for people.

Implementations: ``reference`` (eager PyTorch, everywhere), ``native`` (C++ on the CPU, CUDA C++ on the GPU), ``triton``
(GPU; on the CPU only in Triton's interpreter, and only where forced). The first available one in the op's order of
preference serves.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from qts_kernels import _native


@dataclass(frozen=True)
class Implementation:
    """One way to run an op. ``load`` returns the function; ``absent`` the reason why it can't be had, or None."""

    name: str
    load: Callable[[], Callable]
    absent: Callable[[], str | None]


@dataclass(frozen=True)
class ReportRow:
    """Which implementation serves ``op`` on ``device``, and why that one."""

    op: str
    device: str
    implementation: str
    reason: str


_table: dict[tuple[str, str], list[Implementation]] = {}
_chosen: dict[tuple[str, str], Callable] = {}
_forced: dict[str | None, str] = {}
_warned: set[str] = set()


def register(
    op: str,
    reference: Callable,
    *,
    native: tuple[str, ...] = (),
    triton: Callable[[], Callable] | None = None,
) -> None:
    """Declare an op's implementations: ``native`` names the devices whose extension has it, ``triton`` loads its
    launcher."""
    eager = Implementation("reference", lambda: reference, lambda: None)
    for device, extension in (("cpu", "_C"), ("cuda", "_C_cuda")):
        order = []
        if device == "cuda" and triton is not None:
            order.append(Implementation("triton", triton, _triton_absent))
        if device in native:
            order.append(
                Implementation(
                    "native",
                    lambda: getattr(torch.ops.qts_kernels_native, op).default,
                    lambda extension=extension: _native.absent(extension),
                )
            )
        order.append(eager)
        if device == "cpu" and triton is not None:
            order.append(Implementation("triton", triton, _triton_absent))
        _table[op, device] = order


def implementation(op: str, x: torch.Tensor) -> Callable:
    """The function that serves ``op`` for ``x``. float64 is served by the reference; it exists to check the others."""
    device = x.device.type
    if op in _forced:
        return _load_named(op, device, _forced[op])
    if None in _forced and _forced[None] in (i.name for i in _table.get((op, device), ())):
        return _load_named(op, device, _forced[None])
    if x.dtype == torch.float64:
        return _load_named(op, device, "reference")
    if (op, device) not in _chosen:
        _chosen[op, device] = _choose(op, device)
    return _chosen[op, device]


def _choose(op: str, device: str) -> Callable:
    if (op, device) not in _table:
        raise ValueError(f"{op} runs on {sorted(d for o, d in _table if o == op)} tensors, got {device}")
    for candidate in _table[op, device]:
        reason = candidate.absent()
        if reason is None:
            return candidate.load()
        if reason not in _warned:
            _warned.add(reason)
            warnings.warn(
                f"qts_kernels: {reason}; {op} and others run slower in eager PyTorch",
                RuntimeWarning,
                stacklevel=4,
            )
    raise AssertionError("unreachable: the reference is always available")


def _load_named(op: str, device: str, name: str) -> Callable:
    named = {candidate.name: candidate for candidate in _table[op, device]}
    if name not in named:
        raise ValueError(f"{op} on {device} has the implementations {list(named)}, got {name!r}")
    reason = named[name].absent()
    if reason is not None:
        raise RuntimeError(f"{op} was forced to {name!r}, which is not available: {reason}")
    return named[name].load()


def _triton_absent() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); pip install triton"
    return None


@contextmanager
def force(name: str, op: str | None = None) -> Iterator[None]:
    """Within the context, ``name`` ("reference", "native" or "triton") serves ``op``, or every op that has it where
    ``op`` is None.

    When the op is called this raises RuntimeError where that implementation is not available, and ValueError where a
    named ``op`` has none of that name on the device.
    """
    if name not in ("reference", "native", "triton"):
        raise ValueError(f"name must be 'reference', 'native' or 'triton', got {name!r}")
    before = dict(_forced)
    _forced[op] = name
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def report() -> list[ReportRow]:
    """One row for each op and device: what serves it here, and why not something better."""
    rows = []
    for (op, device), candidates in sorted(_table.items()):
        if device == "cuda" and not torch.cuda.is_available():
            continue
        skipped = []
        for candidate in candidates:
            reason = candidate.absent()
            if reason is None:
                rows.append(ReportRow(op, device, candidate.name, "; ".join(skipped) or "first choice"))
                break
            skipped.append(f"no {candidate.name}: {reason}")
    return rows
