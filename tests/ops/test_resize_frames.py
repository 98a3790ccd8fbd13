"""resize_frames: against F.interpolate, F.adaptive_avg_pool2d and torch.linspace, a frame at a time."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qts_kernels
from qts_kernels import _native, backends
from qts_kernels.testing import assert_within_budget, poisoned_memory

NATIVE = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))
SERVED = ["reference", pytest.param("native", marks=NATIVE)]
MODES = ["bilinear", "adaptive_avg", "linspace"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOLDEN = Path(__file__).parents[1] / "golden" / "quota_a.safetensors"
# Smaller, larger, one row, one column, the same grid, none at all.
SIZES = [(3, 2), (0, 4), (7, 11), (1, 1), (5, 6), (1, 9), (13, 1), (0, 0), (4, 6), (2, 0)]


def loop(frames, sizes, mode):
    """What people write today: one call a frame."""
    out = []
    for frame, size in zip(frames, sizes, strict=True):
        if 0 in size:
            continue
        image = frame.permute(2, 0, 1)[None]
        if mode == "bilinear":
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        elif mode == "adaptive_avg":
            image = F.adaptive_avg_pool2d(image, size)
        else:
            tokens = frame.shape[0] * frame.shape[1]
            index = torch.linspace(0, tokens - 1, size[0] * size[1], dtype=torch.float32).long()
            image = image.flatten(2)[:, :, index.to(frame.device), None]
        out.append(image[0].flatten(1).t())
    return torch.cat(out) if out else frames.new_zeros(0, frames.shape[3])


def draw(shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("columns", [1, 5, 64, 1030])
def test_a_call_a_frame(device, mode, dtype, columns):
    frames, sizes = draw((len(SIZES), 5, 6, columns), dtype, device), torch.tensor(SIZES)
    with poisoned_memory():
        tokens, cu_seqlens = qts_kernels.resize_frames(frames, sizes.to(device), mode)
    assert tokens.dtype == dtype
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *sizes.prod(1).cumsum(0).tolist()]
    if mode == "linspace":
        assert torch.equal(tokens, loop(frames, SIZES, mode))
    else:
        assert_within_budget(tokens, loop(frames, SIZES, mode), loop(frames.double(), SIZES, mode))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_gradient(device, mode, dtype):
    sizes = torch.tensor(SIZES)
    weight = draw((int(sizes.prod(1).sum()), 37), dtype, device, 1)
    results = []
    for run, cast in ((qts_kernels.resize_frames, dtype), (loop, dtype), (loop, torch.float64)):
        frames = draw((len(SIZES), 5, 6, 37), dtype, device).to(cast).requires_grad_()
        with poisoned_memory():
            out = run(frames, sizes, mode)[0] if run is not loop else loop(frames, SIZES, mode)
            results.append(torch.autograd.grad(out, frames, weight.to(cast))[0])
    assert_within_budget(*results)


@pytest.mark.parametrize("served", SERVED)
def test_golden(served):
    """The release's v1, v2 and v3 of the frames that got tokens."""
    held = load_file(GOLDEN)
    frames = held["x"].view(6, 9, 9, 16)
    for mode, version in zip(MODES, ("v1", "v2", "v3"), strict=True):
        expected = [held[f"{version}.{i}"] for i in range(4)]
        sizes = torch.zeros(6, 2, dtype=torch.int64)
        sizes[[0, 2, 3, 5]] = torch.tensor([e.shape[:2] if e.ndim == 3 else (e.shape[0], 1) for e in expected])
        with backends.force(served):
            tokens, _ = qts_kernels.resize_frames(frames, sizes, mode)
        expected = torch.cat([e.reshape(-1, 16) for e in expected])
        if mode == "linspace":
            assert torch.equal(tokens, expected)
        else:
            torch.testing.assert_close(tokens, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("served", SERVED)
def test_linspace_has_the_indices_of_torch(served):
    """Among them those where float32 falls below an integer that exact arithmetic meets."""
    differ = 0
    for side in (7, 9, 27):
        tokens = side * side
        numbers = [*range(1, tokens + 1, 1 if tokens < 100 else 7), 2 * tokens]
        frames = torch.arange(tokens).view(1, side, side, 1).expand(len(numbers), -1, -1, -1).float()
        with backends.force(served):
            found, _ = qts_kernels.resize_frames(frames, torch.tensor([(1, n) for n in numbers]), "linspace")
        expected = [torch.linspace(0, tokens - 1, n).long() for n in numbers]
        assert torch.equal(found[:, 0].long(), torch.cat(expected))
        exact = torch.cat([torch.arange(n) * (tokens - 1) // max(n - 1, 1) for n in numbers])
        differ += int((found[:, 0].long() != exact).sum())
    assert differ


@NATIVE
@pytest.mark.parametrize("mode", MODES)
def test_native_at_a_real_shape(mode):
    """More columns than a chunk of the sums holds, more tokens than a grid row."""
    sizes = torch.tensor([(8, 9), (27, 27), (30, 40), (1, 1), (0, 5), (12, 12)])
    frames = draw((6, 27, 27, 3584))
    results = {}
    for name in ("native", "reference"):
        with backends.force(name), poisoned_memory():
            results[name] = qts_kernels.resize_frames(frames, sizes, mode)[0]
    exact = qts_kernels.resize_frames(frames.double(), sizes, mode)[0]
    assert_within_budget(results["native"], results["reference"], exact)


@NATIVE
@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_a_bit(mode):
    sizes = torch.tensor(SIZES)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            frames = draw((len(SIZES), 27, 26, 300)).requires_grad_()
            out = qts_kernels.resize_frames(frames, sizes, mode)[0]
            out.backward(draw(out.shape, seed=1))
            results.append((out.detach(), frames.grad))
    finally:
        torch.set_num_threads(before)
    for a, b in results[1:]:
        assert torch.equal(a, results[0][0])
        assert torch.equal(b, results[0][1])


@pytest.mark.parametrize("mode", MODES)
def test_zeros_up_to_max_tokens(device, mode):
    frames, sizes = draw((3, 4, 5, 6), device=device), torch.tensor([(2, 2), (0, 1), (3, 1)], device=device)
    with poisoned_memory():
        tokens, cu_seqlens = qts_kernels.resize_frames(frames, sizes.int(), mode, max_tokens=10)
    exact, _ = qts_kernels.resize_frames(frames, sizes.cpu(), mode)
    assert tokens.shape == (10, 6)
    assert torch.equal(tokens[:7], exact)
    assert not tokens[7:].any()
    assert cu_seqlens.tolist() == [0, 4, 4, 7]


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("mode", MODES)
def test_a_frame_that_is_cut(served, mode):
    """As a GPU does where max_tokens is too small: the tokens that are there are right, and so are their gradients."""
    frames, sizes = draw((2, 5, 6, 7)), torch.tensor([(3, 4), (6, 7)])
    cut = torch.tensor([0, 12, 30], dtype=torch.int32)
    whole, cu_seqlens = qts_kernels.resize_frames(frames, sizes, mode)
    arguments = (sizes, cut, 30, mode)
    grad = draw((30, 7), seed=1)
    with poisoned_memory():
        forward = backends.force(served)
        with forward:
            run = backends.implementation("resize_frames", frames)
            back = backends.implementation("resize_frames_backward", frames)
        assert_within_budget(run(frames, *arguments), whole[:30], whole[:30].double())
        padded = F.pad(grad, (0, 0, 0, 24))
        expected = torch.ops.qts_kernels.resize_frames_backward(padded, sizes, cu_seqlens, 5, 6, mode)
        exact = torch.ops.qts_kernels.resize_frames_backward(padded.double(), sizes, cu_seqlens, 5, 6, mode)
        assert_within_budget(back(grad, sizes, cut, 5, 6, mode), expected, exact)


@pytest.mark.parametrize("mode", MODES)
def test_no_frames_no_tokens_no_columns(device, mode):
    for frames, sizes in (((0, 3, 3, 5), (0, 2)), ((2, 3, 3, 5), None), ((2, 1, 1, 0), (2, 2))):
        sizes = torch.zeros(2, 2, dtype=torch.int64) if sizes is None else torch.ones(sizes, dtype=torch.int64)
        x = torch.zeros(frames, device=device).requires_grad_()
        tokens, cu_seqlens = qts_kernels.resize_frames(x, sizes, mode)
        assert tokens.shape == (int(sizes.prod(1).sum()), frames[3])
        assert cu_seqlens.shape == (frames[0] + 1,)
        tokens.sum().backward()
        assert not x.grad.any()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_the_grids(data):
    """A constant stays, every token is between the frame's extremes, and the frame's own grid changes nothing."""
    side = st.integers(1, 12)
    height, width = data.draw(side), data.draw(side)
    sizes = torch.tensor(data.draw(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=5)))
    frames = draw((len(sizes) + 1, height, width, 3), seed=height)
    frames[0] = 0.3
    sizes = torch.cat([sizes, torch.tensor([[height, width]])])
    for mode in MODES:
        with poisoned_memory():
            tokens, cu_seqlens = qts_kernels.resize_frames(frames, sizes, mode)
        offsets = cu_seqlens.tolist()
        torch.testing.assert_close(tokens[: offsets[1]], torch.full((offsets[1], 3), 0.3), rtol=1e-6, atol=0)
        assert torch.equal(tokens[offsets[-2] :], frames[-1].view(-1, 3))
        for frame, part in zip(frames, tokens.split(cu_seqlens.diff().tolist()), strict=True):
            low, high = frame.flatten(0, 1).amin(0), frame.flatten(0, 1).amax(0)
            assert ((part >= low - 1e-6) & (part <= high + 1e-6)).all()


def test_layouts_that_are_not_contiguous(device):
    sizes = torch.tensor([(3, 2), (4, 7)])
    base = draw((4, 9, 6, 5), device=device)
    for x in (base[::2], base.permute(0, 3, 2, 1)[:2], base[:1].expand(2, -1, -1, -1), base[:2, 1:, :, ::2]):
        got = qts_kernels.resize_frames(x, sizes)[0]
        assert torch.equal(got, qts_kernels.resize_frames(x.contiguous(), sizes)[0])


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(device, mode):
    frames = draw((4, 3, 4, 2), torch.float64, device).requires_grad_()
    sizes = torch.tensor([(2, 3), (0, 1), (5, 2), (4, 9)])

    def run(x):
        return qts_kernels.resize_frames(x, sizes, mode)[0]

    assert torch.autograd.gradcheck(run, frames)
    assert torch.autograd.gradgradcheck(lambda x: run(x) ** 2, frames)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(device, mode):
    frames = draw((3, 3, 4, 2), device=device).requires_grad_()
    sizes, cu = torch.tensor([(2, 3), (0, 1), (5, 2)], device=device), torch.tensor([0, 6, 6, 16], device=device).int()
    torch.library.opcheck(torch.ops.qts_kernels.resize_frames.default, (frames, sizes, cu, 20, mode))
    grad = draw((20, 2), device=device).requires_grad_()
    torch.library.opcheck(torch.ops.qts_kernels.resize_frames_backward.default, (grad, sizes, cu, 3, 4, mode))


def test_compiles_without_a_graph_break(device):
    frames = draw((3, 3, 4, 2), device=device).requires_grad_()
    sizes = torch.tensor([(2, 3), (0, 1), (5, 2)], device=device)

    def run(frames, sizes):
        return qts_kernels.resize_frames(frames * 2, sizes, max_tokens=20)[0] + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(frames, sizes), run(frames, sizes))
    gradients = [torch.autograd.grad(f(frames, sizes).square().sum(), frames)[0] for f in (compiled, run)]
    assert torch.equal(*gradients)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_a_gpu_neither_synchronises_nor_leaves_its_memory(mode):
    frames = draw((4, 5, 6, 300), device="cuda").requires_grad_()
    sizes = torch.tensor([(3, -2), (2**40, 1), (2, 2), (5, 5)], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens, cu_seqlens = qts_kernels.resize_frames(frames, sizes, mode, max_tokens=20)
        tokens.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cu_seqlens.tolist() == [0, 0, 20, 20, 20]
    assert tokens.isfinite().all()


@pytest.mark.parametrize(
    "error,match,arguments",
    [
        (TypeError, r"frames must be a tensor \[T, h, w, D\], got list", {"frames": [1.0]}),
        (ValueError, r"frames must have shape \[T, h, w, D\], got \[2, 9, 5\]", {"frames": torch.zeros(2, 9, 5)}),
        (TypeError, "frames must be float32 or bfloat16", {"frames": torch.zeros(2, 3, 3, 5).int()}),
        (ValueError, r"h and w in \[1, 32767\], got shape \[2, 0, 3, 5\]", {"frames": torch.zeros(2, 0, 3, 5)}),
        (TypeError, "sizes must be int64 or int32, got float32", {"sizes": torch.ones(2, 2)}),
        (ValueError, r"sizes must have shape \[T, 2\] = \[2, 2\], got \[3, 2\]", {"sizes": torch.ones(3, 2).int()}),
        (ValueError, r"sizes must be in \[0, 32767\], got -3", {"sizes": torch.tensor([(1, -3), (1, 1)])}),
        (ValueError, r"sizes must be in \[0, 32767\], got 32768", {"sizes": torch.tensor([(1, 3), (0, 32768)])}),
        (ValueError, r"mode must be one of \['bilinear', 'adaptive_avg', 'linspace'\], got 'area'", {"mode": "area"}),
        (ValueError, "max_tokens must not be negative, got -1", {"max_tokens": -1}),
        (ValueError, "max_tokens must hold the 8 tokens of sizes, got 7", {"max_tokens": 7}),
    ],
)
def test_bad_input(error, match, arguments):
    with pytest.raises(error, match=match):
        qts_kernels.resize_frames(
            **{"frames": torch.zeros(2, 3, 3, 5), "sizes": torch.tensor([(2, 2), (1, 4)]), **arguments}
        )
