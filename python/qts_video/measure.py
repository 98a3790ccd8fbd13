"""What a call took: seconds of each stage, and the peak of its memory."""

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .adapters import find_adapter
from .dropin.stopwatch import Stopwatch


@dataclass
class Measurement:
    """Filled when the context of ``measure`` ends."""

    vision: float = 0.0
    """Seconds in the vision tower."""
    prefill: float = 0.0
    """Seconds in the language model's first call, in which it reads the prompt."""
    total: float = 0.0
    """Seconds in the whole context."""
    peak_bytes: int | None = None
    """Most memory in use at a time, less what was in use at the start: of the GPU, else of the process.
    None: unknown."""
    _stopwatch: Stopwatch = field(default_factory=Stopwatch, repr=False)


@contextmanager
def measure(model: torch.nn.Module) -> Iterator[Measurement]:
    """Measure one call of ``model`` (one with an adapter) or of its ``generate``, selector attached or not."""
    device = next(model.parameters()).device
    result = Measurement()
    watch = result._stopwatch
    parts = find_adapter(model).parts(model)
    hooks = [*_time(watch, "vision", parts.vision, device), *_time(watch, "prefill", parts.decoder, device, once=True)]
    try:
        with peak_memory(device) as peak:
            start = time.perf_counter()
            yield result
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            result.total = time.perf_counter() - start
        seconds = watch.seconds()
        result.vision, result.prefill = seconds.get("vision", 0.0), seconds.get("prefill", 0.0)
        result.peak_bytes = peak()
    finally:
        for hook in hooks:
            hook.remove()


def _time(
    watch: Stopwatch, stage: str, module: torch.nn.Module, device: torch.device, once: bool = False
) -> list[torch.utils.hooks.RemovableHandle]:
    done, depth = False, 0

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def before(*_: object) -> None:
        if depth == 1 and not (once and done):
            watch.start(stage, device)

    def after(*_: object) -> None:
        nonlocal done
        if depth == 1 and not (once and done):
            watch.stop(stage, device)
            done = True  # a call that was left early does not come here

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    # A selector's own hooks on the decoder are not in "prefill": before and after are the innermost of all hooks. Nor
    # are the calls that it makes there, to score (FlexSelect leaves one early) or to ask of the question (QuoTA): these
    # are inside of the prefill's, from enter to leave, the outermost.
    return [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that gives the most bytes in use at a time since the context began, less those in use then: of
    the GPU, else of the process (looked at every 2 ms); None where the system does not tell."""
    if device.type == "cuda":
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - start
        return
    _return_freed_memory()
    start = resident_bytes()
    if start is None:
        yield lambda: None
        return
    peak, stop = start, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.002):
            peak = max(peak, resident_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak - start
    finally:
        stop.set()
        thread.join()


def _return_freed_memory() -> None:
    """What earlier calls freed goes back to the system, or this call would use it again and seem to need less."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM. None where the system does not tell (no /proc)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    import resource

    return pages * resource.getpagesize()
