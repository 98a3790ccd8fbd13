"""Tensors that say they are on cuda:0 and hold their numbers on the CPU."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from pretended_gpu import attention

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MIXED = {*INDEXED, "aten::copy_", "aten::_foreach_copy_", "aten::_has_compatible_shallow_copy_type"}
"""Ops that take tensors of two devices. Others take of the CPU what has no dimensions: scalars."""
WAITS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"),
    *("aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount", "aten::nonzero_numpy"),
}
UNWRITTEN = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}


class PretendedTensor(Tensor):
    """``inner`` holds the numbers. Made by PretendedGpu alone.

    To the C++ of torch it is on the CPU, for autograd and indexing would ask a driver about a card: only Python is
    told of one.
    """

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendedTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=HOST,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self) -> int:
        return DEVICE.index

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        return self.to(HOST)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False):
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")
        return self.detach().cpu().numpy()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def __repr__(self) -> str:
        return f"{self.inner!r} on {DEVICE}"

    def __deepcopy__(self, memo: dict) -> Tensor:
        with torch.no_grad():
            copied = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called outside of PretendedGpu")


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        ctx.back = x.device, non_blocking
        return GPU.moved(x, non_blocking)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return _Moved.apply(grad, *ctx.back), None, None


_to = Tensor.to


def to(self: Tensor, *args, copy: bool = False, **kwargs) -> Tensor:
    """Tensor.to, between the devices that Python sees."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    elif "other" in kwargs:
        other = kwargs.pop("other")
        args = (other.device, other.dtype, *args)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    there = isinstance(self, PretendedTensor)
    if not there and device is not None and device.type != DEVICE.type:
        return _to(self, device, dtype or self.dtype, non_blocking=non_blocking, copy=copy)
    moves = device is not None and there != (device.type == DEVICE.type)
    x = _Moved.apply(self, device, non_blocking) if moves else self
    dtype = x.dtype if dtype is None else dtype
    return _to(x, dtype, copy=copy and not moves, memory_format=memory_format or torch.preserve_format)


class SynchronisationError(RuntimeError):
    """What set_sync_debug_mode("error") and the capture of a graph make of a call that waits for the card."""


class PretendedGpu(TorchDispatchMode):
    """Runs every op on the numbers, and raises where a card would have: tensors of two devices, or a call that waits
    for the card while ``forbids_waiting``.

    Ops of qts_kernels run what they would on the card. What runs is kept in ``recorded``, where that is a list: that of
    a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forbids_waiting = False
        self.recorded: list[Callable[[], object]] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, PretendedTensor) for x in tensors)
        name = func._schema.name
        if name == "aten::_to_copy" and there:
            kwargs.pop("device", None)  # the C++ of torch means this device: Python moves by GPU.moved
        asked = kwargs.get("device")
        on_gpu = there if asked is None else torch.device(asked).type == DEVICE.type
        if torch._C._current_graph_task_id() >= 0 and there and not _here(tensors):
            on_gpu = True  # it is asked for where the C++ of torch sees the others
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if not there and not on_gpu:
            out = func(*args, **kwargs)
            if torch._C._current_graph_task_id() >= 0 and not _here(tensors):
                for x in tree_leaves(out):
                    if isinstance(x, Tensor):
                        x.of_autograd = True  # zeros, for a graph of either device
            return out
        _check_devices(name, tensors)
        if self.forbids_waiting and _waits(name, func, args, kwargs):
            raise SynchronisationError(f"called a synchronizing CUDA operation: {name}")
        space, _, op = name.partition("::")
        if space == "qts_kernels":
            with self:
                return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        if name == "aten::copy_" and not isinstance(args[0], PretendedTensor):
            return args[0].copy_(args[1].inner)
        if asked is not None:
            kwargs["device"] = HOST
        inner_args, inner_kwargs = tree_map_only(PretendedTensor, lambda x: x.inner, (args, kwargs))
        run = getattr(attention, op) if space == "torch_attn" else func
        out = run(*inner_args, **inner_kwargs)
        if not on_gpu:
            return out
        aliases = [x.alias_info for x in (*func._schema.arguments, *func._schema.returns) if x.alias_info is not None]
        if any(alias.is_write for alias in aliases):
            self.record(lambda: run(*inner_args, **inner_kwargs))
        elif not aliases and name not in UNWRITTEN:
            self.record(lambda: run(*inner_args, **inner_kwargs), out)
        out = tree_map_only(Tensor, PretendedTensor, out)
        return out if space == "torch_attn" else return_and_correct_aliasing(func, args, kwargs, out)

    def moved(self, x: Tensor, non_blocking: bool) -> Tensor:
        """``x`` on the other device."""
        if self.forbids_waiting and not non_blocking:
            raise SynchronisationError("called a synchronizing CUDA operation: a copy between devices")
        with _disable_current_modes():
            return x.inner.clone() if isinstance(x, PretendedTensor) else PretendedTensor(x.clone())

    def record(self, run: Callable[[], object], out: object = ()) -> None:
        """Have a graph that is being captured run this again, and write what it makes to where ``out`` is."""
        if self.recorded is None:
            return
        held = [x for x in tree_leaves(out) if isinstance(x, Tensor)]

        def again() -> None:
            made = [x for x in tree_leaves(run()) if isinstance(x, Tensor)]
            for x, new in zip(held, made if held else (), strict=True):
                x.copy_(new)

        self.recorded.append(again)


def _here(tensors: list[Tensor]) -> list[Tensor]:
    """Those that are on the CPU, and were not made by autograd alone."""
    return [x for x in tensors if not isinstance(x, PretendedTensor) and not getattr(x, "of_autograd", False)]


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    strays = [x for x in _here(tensors) if x.dim() or name.startswith("qts")]
    if strays and len(strays) < len(tensors) and name not in MIXED:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got "
            f"{', '.join(f'{list(x.shape)} on {x.device}' for x in tensors)}"
        )


def _waits(name: str, func, args: tuple, kwargs: dict) -> bool:
    if name == "aten::copy_":
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        return blocking and args[0].device != args[1].device
    if name in INDEXED:
        indices = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
        return any(x.dtype in (torch.bool, torch.uint8) or not isinstance(x, PretendedTensor) for x in indices)
    if name == "aten::repeat_interleave":
        return func._overloadname == "Tensor" and kwargs.get("output_size") is None
    return name in WAITS


GPU = PretendedGpu()
