"""What encoding in chunks saves, and what it costs: memory, and bits where a kernel depends on the number of rows."""

import pytest
import qts_video
import torch
from qts_video.adapters import find_adapter
from qts_video.methods import Uniform
from test_vision_chunks import assert_same, encode, without_layers
from tiny import Video, prompt, user
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qts_kernels.testing import assert_within_budget

aten = torch.ops.aten


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def in_dtype(batch, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


class RowByRow(TorchDispatchMode):
    """Matrix products and activations a row at a time, so that no kernel is chosen by the number of rows, and none
    computes the last elements of a tensor otherwise than those before."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.addmm.default:
            return torch.cat([func(args[0], row, *args[2:], **kwargs) for row in args[1].split(1)])
        if func in (aten.mm.default, aten.gelu.default, aten.sigmoid.default, aten.silu.default):
            return torch.cat([func(row, *args[1:], **kwargs) for row in args[0].split(1)])
        return func(*args, **kwargs)


@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["one", "unequal", "several"])
def test_in_float32_other_bits_come_from_kernels_that_depend_on_the_number_of_rows(family, name, frames):
    """Which on the CPU are the library's products of few rows, and the ends of activations."""
    model, batch = family.build_model().float(), in_dtype(family.inputs(*family.prompts[name]), torch.float32)
    with torch.no_grad(), RowByRow():
        wanted = encode(model, batch)
        with qts_video.attach(model, Uniform(0.5), vision_chunk_frames=frames):
            ours = encode(model, batch)
    assert_same(without_layers(ours), without_layers(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frames", [1, 2, 3])
def test_lower_precision_is_as_exact_as_at_once(family, frames, dtype):
    model = family.build_model().to(dtype)
    batch = in_dtype(family.inputs(*family.prompts["unequal"]), dtype)
    with torch.no_grad():
        whole = tensors(without_layers(encode(model, batch)))
        with qts_video.attach(model, Uniform(0.5), vision_chunk_frames=frames):
            ours = tensors(without_layers(encode(model, batch)))
        exact = tensors(without_layers(encode(model.double(), in_dtype(batch, torch.float64))))
    for got, eager, truth in zip(ours, whole, exact, strict=True):
        assert got.dtype == eager.dtype == dtype
        assert_within_budget(got, eager, truth)


class LiveBytes(TorchDispatchMode):
    """The most bytes of floating-point tensors alive at a time, those of ``known`` aside."""

    def __init__(self, known):
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tensors(output):
            storage = tensor.untyped_storage()
            if tensor.is_floating_point() and storage.data_ptr() not in self._known:
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {name: (ref, size) for name, (ref, size) in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return output


def bytes_of(output):
    storages = [tensor.untyped_storage() for tensor in tensors(output)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cost(family, model, steps, frames):
    """Bytes: (most while the video encoder runs, of what it returns and of what is joined at a time)."""
    batch = family.inputs(prompt(user(Video(steps), [30])))
    with (
        qts_video.attach(model, Uniform(0.5), vision_chunk_frames=frames),
        torch.no_grad(),
        LiveBytes([*model.parameters(), *model.buffers(), *batch.values()]) as live,
    ):
        output = encode(model, batch)
    output = without_layers(output)
    joined = max(map(bytes_of, output.values())) if isinstance(output, dict) else bytes_of(output)
    return live.peak, bytes_of(output) + joined


def test_beyond_its_outputs_memory_does_not_grow_with_the_frames(family, model):
    """What the chunks gave lies there until it is joined, field by field where the output has fields; that of LLaVA may
    end in a newline each."""
    newline = getattr(find_adapter(model).parts(model).base, "image_newline", torch.empty(0))
    for frames in (None, 4):
        short, long = (cost(family, model, steps, frames) for steps in (32, 96))
        growth, outputs = long[0] - short[0], long[1] - short[1]
        assert outputs > 0
        assert (growth > outputs + (96 - 32) // 4 * newline.nbytes) == (frames is None)
