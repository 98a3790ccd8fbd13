"""The re-encoder's fused pieces, forward and backward: every element type and shape against fp64, by error budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import qts_kernels
from qts_kernels import _native
from qts_kernels.testing import assert_within_budget, poisoned_memory

NATIVE = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of one element, of whole vectors, of odd tails; longer than a GPU block keeps in registers, vectors or single.
WIDTHS = (1, 7, 64, 129, 1000, 2048, 8200, 8195)


def draw(*shape, dtype=torch.float32, device="cpu", seed=0, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(device, dtype)


def up(*tensors):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in tensors]


def eager_norm(total, weight, eps):
    """As the models write it: statistics in fp32, or better where the input is better."""
    wide = total.float() if total.dtype in (torch.bfloat16, torch.float16) else total
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.to(wide.dtype)).to(total.dtype)


def eager_gather(tokens, indices, addend, weight, eps):
    padded = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
    total = padded.index_select(0, torch.where(indices < 0, tokens.shape[0], indices))
    if addend is not None:
        total = (total + addend) * (indices >= 0)[:, None].to(total.dtype)
    return total, eager_norm(total, weight, eps)


def eager_add(x, residual, weight, eps):
    return x + residual, eager_norm(x + residual, weight, eps)


def eager_gelu(x, bias):
    return F.gelu(x + bias)


def check(ours, eager, args, *, atol=1e-6):
    """Ours and eager's within budget of eager in fp64. What ours rounds in between is given to the fp64 run as it is:
    the norm is that of the rounded sum."""
    with poisoned_memory():
        got = ours(*args)
    got = got if isinstance(got, tuple) else (got,)
    rough, exact = eager(*args), eager(*up(*args))
    rough, exact = (x if isinstance(x, tuple) else (x,) for x in (rough, exact))
    for a, b, c in zip(got, rough, exact, strict=True):
        assert a.dtype == args[0].dtype
        assert_within_budget(a, b, c, atol=atol)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_addend", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_gather_add_rms_norm(device, dtype, width, with_addend, with_weight):
    options = {"dtype": dtype, "device": device}
    tokens, addend, weight = (
        draw(11, width, **options),
        draw(19, width, seed=1, **options),
        draw(width, seed=2, **options),
    )
    indices = torch.randint(-1, 11, (19,), generator=torch.Generator().manual_seed(3)).to(device)
    indices[4] = -1
    args = (tokens, indices, addend if with_addend else None, weight if with_weight else None, 1e-6)
    residual, normed = check(qts_kernels.gather_add_rms_norm, eager_gather, args)
    assert (residual[indices == -1] == 0).all()
    assert (normed[indices == -1] == 0).all()
    if not with_addend:
        assert torch.equal(residual, eager_gather(*args)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_weight", [False, True])
def test_add_rms_norm(device, dtype, width, with_weight):
    x, residual = (draw(9, width, dtype=dtype, device=device, seed=s) for s in (0, 1))
    weight = draw(width, dtype=dtype, device=device, seed=2) if with_weight else None
    total, _ = check(qts_kernels.add_rms_norm, eager_add, (x, residual, weight, 1e-5))
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_bias_gelu(device, dtype, width):
    x, bias = draw(9, width, dtype=dtype, device=device, scale=3), draw(width, dtype=dtype, device=device, seed=1)
    check(qts_kernels.bias_gelu, eager_gelu, (x, bias))


@NATIVE
def test_gelu_keeps_its_digits_where_eager_loses_them(device):
    """1 + erf(y / sqrt 2) cancels for negative y; to four units in the last place, taken from a tail, it does not."""
    y = torch.linspace(-10, 8, 20_001, device=device)[None]
    got = qts_kernels.bias_gelu(y, torch.zeros(20_001, device=device))
    exact = y.double() / 2 * torch.erfc(-y.double() / 2**0.5)
    # exp(-y^2 / 2) carries the rounding of its argument, y^2 / 2 times half a unit.
    units = ((got - exact) / exact).abs() / torch.finfo(torch.float32).eps
    assert (units[exact != 0] <= (4 + y.double().square() / 2)[exact != 0]).all()


@NATIVE
def test_gelu_at_the_ends(device):
    y = torch.tensor([[0.0, -0.0, 100.0, -100.0, 3e38, -3e38, torch.inf, torch.nan]], device=device)
    got = qts_kernels.bias_gelu(y, torch.zeros(8, device=device))[0].tolist()
    assert got[:7] == [0, 0, 100, 0, pytest.approx(3e38), 0, torch.inf]
    assert got[7] != got[7]


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_bias_gelu_of_nothing(device, shape):
    x, bias = (
        torch.zeros(shape, device=device, requires_grad=True),
        torch.zeros(shape[1], device=device, requires_grad=True),
    )
    out = qts_kernels.bias_gelu(x, bias)
    assert out.shape == shape
    out.sum().backward()
    assert torch.equal(bias.grad, torch.zeros(shape[1], device=device))


@pytest.mark.parametrize("rows,count", [(0, 3), (4, 0), (0, 0)])
def test_norms_of_no_rows(device, rows, count):
    tokens, weight = draw(rows, 6, device=device).requires_grad_(), draw(6, device=device).requires_grad_()
    indices = torch.full((count,), -1, device=device)
    with poisoned_memory():
        residual, normed = qts_kernels.gather_add_rms_norm(tokens, indices, None, weight)
        (residual.sum() + normed.sum()).backward()
    assert torch.equal(normed, torch.zeros(count, 6, device=device))
    assert torch.equal(weight.grad, torch.zeros(6, device=device))
    assert torch.equal(tokens.grad, torch.zeros(rows, 6, device=device))
    total, normed = qts_kernels.add_rms_norm(tokens, tokens, weight)
    assert total.shape == normed.shape == (rows, 6)


def test_layouts_that_are_not_contiguous_and_rows_that_are_not_aligned(device):
    for dtype in DTYPES:
        base, indices = draw(12, 140, dtype=dtype, device=device), torch.tensor([5, -1, 0, 5], device=device)
        addend, weight = (
            draw(4, 64, dtype=dtype, device=device, seed=1),
            draw(65, dtype=dtype, device=device, seed=2)[1:],
        )
        for tokens in (
            base[:, 3:67],
            base[:, 8:72],
            base[::2, :128:2],
            base[:64, :12].t()[:, :64].repeat(1, 6)[:, 4:68],
        ):
            check(qts_kernels.gather_add_rms_norm, eager_gather, (tokens, indices, addend, weight, 1e-6))
        x = base[:, 1:65]
        check(qts_kernels.add_rms_norm, eager_add, (x, x.flip(0), weight, 1e-6))
        check(qts_kernels.bias_gelu, eager_gelu, (x, weight))


def gradients(run, leaves, cotangents):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = run(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [c.to(o.dtype) for c, o in zip(cotangents, out, strict=True)])
    return [x.grad for x in leaves]


def check_gradients(ours, eager, leaves, cotangents, *, atol):
    with poisoned_memory():
        got = gradients(ours, leaves, cotangents)
    rough, exact = gradients(eager, leaves, cotangents), gradients(eager, up(*leaves), cotangents)
    for a, b, c in zip(got, rough, exact, strict=True):
        assert a.dtype == b.dtype
        assert_within_budget(a, b, c, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_the_norms(device, dtype, width):
    options = {"dtype": dtype, "device": device}
    rows = 70
    x, residual, weight = (
        draw(rows, width, **options),
        draw(rows, width, seed=1, **options),
        draw(width, seed=2, **options),
    )
    cotangents = [draw(rows, width, seed=s, **options) for s in (3, 4)]
    atol = 2e-6
    if width == 1:
        # All cancellation: the gradient is what rounding leaves of rstd (g - g).
        smallest = min((x + residual).abs().min().item(), x.abs().min().item())
        atol = 4 * torch.finfo(torch.float32).eps * max(c.abs().max().item() for c in cotangents) / smallest
    check_gradients(
        lambda x, r, w: qts_kernels.add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: eager_add(x, r, w, 1e-6),
        (x, residual, weight),
        cotangents,
        atol=atol,
    )
    indices = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).to(device)
    indices[::9] = -1
    check_gradients(
        lambda t, a, w: qts_kernels.gather_add_rms_norm(t, indices, a, w, 1e-6),
        lambda t, a, w: eager_gather(t, indices, a, w, 1e-6),
        (x, residual, weight),
        cotangents,
        atol=atol,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_gradients_of_bias_gelu(device, dtype, width):
    x, bias = draw(70, width, dtype=dtype, device=device, scale=2), draw(width, dtype=dtype, device=device, seed=1)
    cotangent = draw(70, width, dtype=dtype, device=device, seed=2)
    check_gradients(qts_kernels.bias_gelu, eager_gelu, (x, bias), [cotangent], atol=2e-6)


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_may_be_unused(device, used):
    x, residual, weight = (
        draw(5, 33, device=device),
        draw(5, 33, device=device, seed=1),
        draw(33, device=device, seed=2),
    )
    leaves = (x, residual) if used == 0 else (x, residual, weight)

    def ours(x, residual, weight=weight):
        return qts_kernels.add_rms_norm(x, residual, weight)[used]

    def eager(x, residual, weight=weight):
        return eager_add(x, residual, weight.to(x.dtype), 1e-6)[used]

    check_gradients(ours, eager, leaves, [draw(5, 33, device=device, seed=3)], atol=2e-6)


def test_rows_of_one_token_add_up(device):
    tokens = draw(3, 8, device=device).requires_grad_()
    qts_kernels.gather_add_rms_norm(tokens, torch.tensor([1, 1, -1, 1], device=device))[0].sum().backward()
    assert tokens.grad.sum(1).tolist() == [0, 24, 0]


def test_gradients_have_the_same_bits_on_every_run_and_thread_count(device):
    x, weight = draw(1000, 300, device=device), draw(300, device=device, seed=1)
    cotangents = [draw(1000, 300, device=device, seed=s) for s in (2, 3)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 2):
            torch.set_num_threads(threads)
            norm = gradients(lambda x, w: qts_kernels.add_rms_norm(x, x, w), (x, weight), cotangents)
            results.append(norm + gradients(qts_kernels.bias_gelu, (x, weight), cotangents[:1]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck(device):
    tokens, addend, weight = (
        draw(*shape, dtype=torch.float64, device=device, seed=s).requires_grad_()
        for s, shape in enumerate(((5, 6), (4, 6), (6,)))
    )
    indices = torch.tensor([3, -1, 0, 3], device=device)
    run = qts_kernels.gather_add_rms_norm
    assert torch.autograd.gradcheck(lambda t, a, w: run(t, indices, a, w), (tokens, addend, weight))
    assert torch.autograd.gradcheck(lambda t: run(t, indices), (tokens,))
    assert torch.autograd.gradcheck(lambda x, w: qts_kernels.add_rms_norm(x, x * 2, w), (addend, weight))
    assert torch.autograd.gradcheck(qts_kernels.bias_gelu, (tokens, weight))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 70), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_a_norm_has_unit_rms_and_ignores_scale(rows, width, seed, scale):
    x = draw(rows, width, seed=seed) + 0.1
    _, normed = qts_kernels.add_rms_norm(x, torch.zeros_like(x), eps=0.0)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(rows), rtol=1e-5, atol=0)
    _, again = qts_kernels.add_rms_norm(x * scale, torch.zeros_like(x), eps=0.0)
    torch.testing.assert_close(again, normed, rtol=1e-5, atol=1e-6)


def test_opcheck(device):
    tokens, weight = draw(5, 8, device=device).requires_grad_(), draw(8, device=device, seed=1).requires_grad_()
    indices, addend = torch.tensor([3, -1, 0], device=device), draw(3, 8, device=device, seed=2).requires_grad_()
    grad, rstd = draw(5, 8, device=device, seed=3), torch.rand(5, device=device)
    ops = torch.ops.qts_kernels
    for args in ((tokens, indices, addend, weight, 1e-6), (tokens, indices, None, None, 1e-6)):
        torch.library.opcheck(ops.gather_add_rms_norm.default, args)
    torch.library.opcheck(ops.add_rms_norm.default, (tokens, grad, weight, 1e-6))
    torch.library.opcheck(ops.bias_gelu.default, (tokens, weight))
    plain = tokens.detach(), weight.detach()
    torch.library.opcheck(ops.rms_norm_backward.default, (grad, None, *plain, rstd))
    torch.library.opcheck(ops.rms_norm_backward.default, (grad, grad, plain[0], None, rstd))
    torch.library.opcheck(ops.bias_gelu_backward.default, (grad, *plain))


def test_compiles_without_a_graph_break(device):
    tokens, bias = draw(5, 8, device=device), draw(8, device=device, seed=1).requires_grad_()
    indices = torch.tensor([3, -1, 0], device=device)

    def run(tokens, bias):
        residual, normed = qts_kernels.gather_add_rms_norm(tokens, indices, None, bias)
        total, normed = qts_kernels.add_rms_norm(normed, residual, bias)
        return qts_kernels.bias_gelu(normed, bias) + total

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tokens, bias), run(tokens, bias))
    want, got = (torch.autograd.grad(f(tokens, bias).sum(), bias)[0] for f in (run, compiled))
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_graph_capture_replays():
    tokens, weight = (
        draw(500, 3584, dtype=torch.bfloat16, device="cuda"),
        draw(3584, dtype=torch.bfloat16, device="cuda"),
    )
    indices = torch.arange(0, 500, 5, device="cuda")

    def run():
        residual, normed = qts_kernels.gather_add_rms_norm(tokens, indices, None, weight)
        return qts_kernels.bias_gelu(qts_kernels.add_rms_norm(normed, residual, weight)[1], weight)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    tokens.normal_()
    indices[7] = -1
    graph.replay()
    assert torch.equal(got, run())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_indices_outside_are_zeros_on_a_gpu():
    tokens = torch.ones(4, 64, device="cuda")
    residual, normed = qts_kernels.gather_add_rms_norm(tokens, torch.tensor([-9, 4, 2**40, 1], device="cuda"))
    assert residual.sum(1).tolist() == [0, 0, 0, 64]
    assert (normed[:3] == 0).all()


@pytest.mark.parametrize(
    "error,match,arguments",
    [
        (ValueError, r"tokens must have shape \[M, D\], got \[4\]", {"tokens": torch.zeros(4)}),
        (TypeError, "tokens must be float32 or .*, got int64", {"tokens": torch.zeros(4, 3).long()}),
        (ValueError, r"must have D >= 1, got shape \[4, 0\]", {"tokens": torch.zeros(4, 0)}),
        (TypeError, "indices must be int64, got int32", {"indices": torch.tensor([0]).int()}),
        (ValueError, r"indices must be -1 or in \[0, 4\), got 4", {"indices": torch.tensor([0, 4])}),
        (ValueError, r"indices must be -1 or in \[0, 4\), got -2", {"indices": torch.tensor([-2, 0])}),
        (ValueError, r"addend must have shape \[N, D\] = \[2, 3\], got \[1, 3\]", {"addend": torch.zeros(1, 3)}),
        (TypeError, "addend must have the dtype of tokens", {"addend": torch.zeros(2, 3).half()}),
        (ValueError, r"weight must have shape \[D\] = \[3\], got \[4\]", {"weight": torch.zeros(4)}),
        (TypeError, "weight must have the dtype of tokens", {"weight": torch.zeros(3).bfloat16()}),
        (ValueError, "weight must be on the device of tokens", {"weight": torch.zeros(3, device="meta")}),
    ],
)  # fmt: skip
def test_gather_add_rms_norm_bad_input(error, match, arguments):
    good = {"tokens": torch.zeros(4, 3), "indices": torch.tensor([0, 1])}
    with pytest.raises(error, match=match):
        qts_kernels.gather_add_rms_norm(**{**good, **arguments})


@pytest.mark.parametrize(
    "error,match,call",
    [
        (ValueError, r"x must have shape \[N, D\], got \[3\]", lambda z: qts_kernels.add_rms_norm(z(3), z(3))),
        (ValueError, r"residual must have shape .* got \[2, 4\]", lambda z: qts_kernels.add_rms_norm(z(2, 3), z(2, 4))),
        (TypeError, "residual must have the dtype of x", lambda z: qts_kernels.add_rms_norm(z(2, 3), z(2, 3).half())),
        (ValueError, r"weight must have .* got \[2\]", lambda z: qts_kernels.add_rms_norm(z(2, 3), z(2, 3), z(2))),
        (ValueError, r"x must have shape \[N, F\], got \[3\]", lambda z: qts_kernels.bias_gelu(z(3), z(3))),
        (ValueError, r"bias must have shape \[F\] = \[3\], got \[2\]", lambda z: qts_kernels.bias_gelu(z(4, 3), z(2))),
        (TypeError, "bias must have the dtype of x", lambda z: qts_kernels.bias_gelu(z(4, 3), z(3).double())),
        (TypeError, r"bias must be a tensor \[F\], got float", lambda z: qts_kernels.bias_gelu(z(4, 3), 1.0)),
    ],
)  # fmt: skip
def test_bad_input(error, match, call):
    with pytest.raises(error, match=match):
        call(torch.zeros)
