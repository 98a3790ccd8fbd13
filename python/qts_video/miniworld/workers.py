"""Training in several processes of one thread each, which on a CPU beats one process of several threads."""

import ctypes
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn


def launch(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Run ``work(rank, processes, *arguments)`` in that many processes, joined for ``average_gradients``."""
    if processes == 1:
        work(0, 1, *arguments)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_joined, (processes, port, work, arguments), nprocs=processes)


def _joined(rank: int, processes: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    _keep_memory()
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=processes, rank=rank)
    work(rank, processes, *arguments)
    distributed.destroy_process_group()


def _keep_memory() -> None:
    """Tell glibc to keep freed memory: activations of every step come and go, and each page fault costs."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def average_gradients(parameters: list[nn.Parameter], processes: int) -> None:
    """Replace every gradient by its mean over the processes."""
    if processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= processes
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
