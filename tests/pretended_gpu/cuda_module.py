"""What torch.cuda says and does where there is a card, as far as the project asks."""

import contextlib
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from pretended_gpu.tensors import DEVICE, GPU, PretendedTensor, to

NAME = "pretended"
MEMORY = 8 << 30
PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, L2_cache_size=50 << 20,
    warp_size=32, clock_rate=1_755_000, gcnArchName="", shared_memory_per_multiprocessor=233_472,
)  # fmt: skip


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._at = None

    def record(self, stream: "Stream | None" = None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds."""
        return (end._at - self._at) * 1e3


class Stream:
    def __init__(self, device: object = None, priority: int = 0) -> None:
        self.device, self.cuda_stream = DEVICE, 0

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def synchronize(self) -> None:
        pass


class CUDAGraph:
    def __init__(self) -> None:
        self.recorded: list = []

    def replay(self) -> None:
        with _disable_current_modes():
            for run in self.recorded:
                run()


class Generator(torch.Generator):
    """The CPU's, whatever device is named: its numbers are as random."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


def made_on_the_host(make: Callable) -> Callable:
    """torch.tensor and its like copy to a card from C++, which would ask a driver."""

    def made(data, *args, device: object = None, requires_grad: bool = False, **kwargs) -> torch.Tensor:
        if isinstance(data, PretendedTensor):
            device = data.device if device is None else device
        x = make(tree_map_only(PretendedTensor, lambda x: x.cpu(), data), *args, **kwargs)
        return (x if device is None else x.to(device)).requires_grad_(requires_grad or x.requires_grad)

    return made


def install() -> None:
    """Have torch.cuda speak of one pretended card, until the process ends."""

    @contextlib.contextmanager
    def capture(graph: CUDAGraph, **_: object):
        before = GPU.forbids_waiting
        GPU.forbids_waiting, GPU.recorded = True, graph.recorded
        try:
            yield
        finally:
            GPU.forbids_waiting, GPU.recorded = before, None

    def set_sync_debug_mode(mode: str | int) -> None:
        GPU.forbids_waiting = mode in ("error", 2)

    said = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": NAME,
        "get_device_capability": (9, 0), "get_device_properties": PROPERTIES, "is_bf16_supported": True,
        "mem_get_info": (MEMORY, MEMORY), "memory_allocated": 0, "memory_reserved": 0, "max_memory_allocated": 0,
        "reset_peak_memory_stats": None, "empty_cache": None, "synchronize": None, "manual_seed": None,
        "manual_seed_all": None, "is_current_stream_capturing": False, "_lazy_init": None,
        "get_rng_state_all": [], "set_rng_state_all": None,
    }  # fmt: skip
    for name, answer in said.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.CUDAGraph = Event, Stream, CUDAGraph
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: Stream()
    torch.cuda.device = torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.graph = capture
    torch.cuda.set_sync_debug_mode = set_sync_debug_mode
    torch.Generator = Generator
    torch.inference_mode = torch.no_grad  # its tensors can't be views of others, as those of subclasses are
    torch.Tensor.to = to
    torch.tensor, torch.as_tensor = made_on_the_host(torch.tensor), made_on_the_host(torch.as_tensor)
    PretendedTensor.new_tensor = lambda self, data, **kwargs: torch.tensor(data, **{"device": DEVICE, **kwargs})
    torch.Tensor.cuda = lambda self, device=None, non_blocking=False: self.to(DEVICE, non_blocking=non_blocking)
