"""gather_tokens and topn_gather: rows, bit for bit, of any dtype and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qts_kernels
from qts_kernels import _native, backends
from qts_kernels.testing import poisoned_memory, ragged_cu_seqlens

NATIVE = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8,
    torch.bool, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def draw(shape, dtype, device="cpu", seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50
    return (x.to(torch.float32).to(dtype) if dtype != torch.bool else x > 0).to(device)


def oracle(x, indices):
    """Row by row, as lists of bytes do it."""
    zero = torch.zeros(x.shape[1:], dtype=x.dtype, device=x.device)
    rows = [x[i] if i >= 0 else zero for i in indices.tolist()]
    return torch.stack(rows) if rows else x[:0]


def same_bytes(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) if a.numel() else True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (9,), (40, 5, 3), (33, 129)])
def test_rows_of_any_dtype_and_shape(device, dtype, shape):
    x = draw(shape, dtype, device)
    indices = torch.randint(-1, shape[0], (57,), generator=torch.Generator().manual_seed(1)).to(device)
    with poisoned_memory():
        got = qts_kernels.gather_tokens(x, indices)
    assert same_bytes(got, oracle(x, indices))


@NATIVE
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_rows(threads):
    x, before = draw((5000, 300), torch.float32), torch.get_num_threads()
    indices = torch.randint(-1, 5000, (9001,), generator=torch.Generator().manual_seed(1))
    try:
        torch.set_num_threads(threads)
        with backends.force("native", "gather_tokens"), poisoned_memory():
            got = qts_kernels.gather_tokens(x, indices)
    finally:
        torch.set_num_threads(before)
    assert same_bytes(got, x[indices].masked_fill_((indices < 0).unsqueeze(1), 0))


def test_every_bit_pattern_is_kept(device):
    """NaN payloads and the sign of zero too: a gather copies bytes."""
    bits = torch.tensor([0x7FC00001, -0x3FFFFF, -(2**31), 1], dtype=torch.int32, device=device)
    got = qts_kernels.gather_tokens(bits.view(torch.float32)[:, None], torch.tensor([3, 0, 1, 2], device=device))
    assert torch.equal(got.view(torch.int32)[:, 0], bits[[3, 0, 1, 2]])


def test_extras_of_other_dtypes_in_one_pass(device):
    x, positions = draw((20, 6), torch.bfloat16, device), torch.arange(60, device=device).view(20, 3)
    seconds = torch.linspace(0, 1, 20, device=device)
    indices = torch.tensor([19, 0, -1, 5, 5], device=device)
    with poisoned_memory():
        got = qts_kernels.gather_tokens(x, indices, positions, seconds)
    assert isinstance(got, tuple)
    for a, b in zip(got, (x, positions, seconds), strict=True):
        assert same_bytes(a, oracle(b, indices))


def test_layouts_that_are_not_contiguous(device):
    indices = torch.tensor([3, 0, -1, 2, 3], device=device)
    base = draw((8, 6, 4), torch.float32, device)
    for x in (base[:, 2:5], base[::2], base.transpose(1, 2), base[0].t(), base[:1].expand(5, 6, 4), base[:, :, 1]):
        assert same_bytes(qts_kernels.gather_tokens(x, indices), oracle(x, indices))
    assert same_bytes(qts_kernels.gather_tokens(base, indices.repeat(2)[::2]), oracle(base, indices.repeat(2)[::2]))


@pytest.mark.parametrize("rows,count,width", [(0, 4, 3), (5, 0, 3), (5, 4, 0), (0, 0, 3), (3, 2, 1)])
def test_empty_in_each_direction(device, rows, count, width):
    indices = torch.full((count,), -1, device=device)
    with poisoned_memory():
        got = qts_kernels.gather_tokens(draw((rows, width), torch.float32, device), indices)
    assert torch.equal(got, torch.zeros(count, width, device=device))


def test_a_large_output(device):
    """Above the size at which the CPU asks for huge pages, from an offset that is not aligned to anything."""
    x = draw((3000, 1001), torch.float32, device)[:, 1:]
    indices = torch.arange(2999, -1, -1, device=device)
    with poisoned_memory():
        assert torch.equal(qts_kernels.gather_tokens(x, indices), x.flip(0))


@NATIVE
def test_native_is_the_reference_bit_for_bit():
    tensors = [draw((500, 33), dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64)]
    indices = torch.randint(-1, 500, (3001,), generator=torch.Generator().manual_seed(1))
    results = []
    for name in ("native", "reference"):
        with backends.force(name, "gather_rows"), poisoned_memory():
            results.append(qts_kernels.gather_tokens(tensors[0], indices, *tensors[1:]))
    assert all(same_bytes(a, b) for a, b in zip(*results, strict=True))


@NATIVE
def test_native_never_reads_outside_the_tensor():
    """Without the checks of the public function, rows outside [0, M) are zeros."""
    x = torch.ones(4, 5)
    indices = torch.tensor([-(2**62), -2, 4, 2**62, 1])
    got = torch.ops.qts_kernels_native.gather_rows([x], indices)[0]
    assert got.sum(1).tolist() == [0, 0, 0, 0, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_indices_outside_are_zeros_on_a_gpu():
    got = qts_kernels.gather_tokens(torch.ones(4, 5, device="cuda"), torch.tensor([-7, 4, 2**40, 1], device="cuda"))
    assert got.sum(1).tolist() == [0, 0, 0, 5]


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_addresses_beyond_32_bits_on_a_gpu():
    x = torch.zeros(600_000, 3584, dtype=torch.bfloat16, device="cuda")
    x[-1] = 1
    assert qts_kernels.gather_tokens(x, torch.tensor([599_999, 0], device="cuda")).sum(1).tolist() == [3584, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(0, 9), st.lists(st.integers(-1, 29), max_size=60), st.sampled_from(DTYPES))
def test_any_indices(rows, width, indices, dtype):
    x, indices = draw((rows, width), dtype), torch.tensor([min(i, rows - 1) for i in indices], dtype=torch.int64)
    assert same_bytes(qts_kernels.gather_tokens(x, indices), oracle(x, indices))


def test_gradcheck(device):
    x, extra = (draw(s, torch.float64, device).requires_grad_() for s in ((5, 3), (5, 2, 2)))
    indices = torch.tensor([4, 0, -1, 4], device=device)
    assert torch.autograd.gradcheck(lambda a, b: qts_kernels.gather_tokens(a, indices, a[:, :1] * 2, b), (x, extra))


def test_gradients_of_repeated_rows_add_up(device):
    x = draw((4, 3), torch.float32, device).requires_grad_()
    qts_kernels.gather_tokens(x, torch.tensor([2, 2, -1, 0], device=device), torch.arange(4, device=device))[
        0
    ].sum().backward()
    assert x.grad[:, 0].tolist() == [1, 0, 2, 0]


def test_opcheck(device):
    tensors = [draw((9, 4), torch.float32, device).requires_grad_(), torch.arange(9, device=device)]
    indices = torch.tensor([3, -1, 8], device=device)
    torch.library.opcheck(torch.ops.qts_kernels.gather_rows.default, (tensors, indices))


def test_compiles_without_a_graph_break(device):
    x, scores = draw((2, 30, 4), torch.float32, device), draw((2, 30), torch.float32, device)

    def run(x, scores):
        kept = qts_kernels.topn_gather(x, scores, 5, scores)
        return kept.tokens * 2, kept.extras[0]

    for a, b in zip(torch.compile(run, fullgraph=True)(x, scores), run(x, scores), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_topn_gather_is_the_two_together(device, packed):
    x, scores = draw((2, 30, 4), torch.bfloat16, device), draw((2, 30), torch.float32, device, seed=1)
    seconds = torch.arange(60.0, device=device).view(2, 30)
    n, cu = torch.tensor([3, 8], device=device), None
    if packed:
        x, scores, seconds, cu = (
            x.flatten(0, 1),
            scores.flatten(),
            seconds.flatten(),
            ragged_cu_seqlens([30, 30], device),
        )
    kept = qts_kernels.topn_gather(x, scores, n, seconds, cu_seqlens=cu, max_n=9)
    indices, cu_out = qts_kernels.topn(scores, n, cu_seqlens=cu, max_n=9)
    assert torch.equal(kept.indices, indices)
    assert kept.cu_seqlens.tolist() == cu_out.tolist() == [0, 3, 11]
    assert kept.n.tolist() == [3, 8]
    assert torch.equal(kept.tokens, oracle(x.reshape(60, 4), indices))
    assert torch.equal(kept.extras[0], oracle(seconds.flatten(), indices))
    assert (kept.tokens[11:] == 0).all()


@pytest.mark.parametrize(
    "error,match,arguments",
    [
        (ValueError, r"indices must be -1 or in \[0, 5\), got 5", (torch.zeros(5, 2), torch.tensor([5]))),
        (ValueError, r"indices must be -1 or in \[0, 5\), got -2", (torch.zeros(5, 2), torch.tensor([0, -2]))),
        (ValueError, r"indices must be -1 or in \[0, 0\), got 0", (torch.zeros(0, 2), torch.tensor([0]))),
        (TypeError, "indices must be int64, got int32", (torch.zeros(5, 2), torch.tensor([0]).int())),
        (TypeError, r"indices must be a tensor \[N\], got list", (torch.zeros(5, 2), [0])),
        (ValueError, r"indices must have shape \[N\], got \[1, 1\]", (torch.zeros(5, 2), torch.tensor([[0]]))),
        (ValueError, r"tokens must have shape \[M, ...\]", (torch.tensor(1.0), torch.tensor([0]))),
        (ValueError, r"extras\[0\] must have shape \[M, ...\]", (torch.zeros(5, 2), torch.tensor([0]), torch.zeros(4))),
        (TypeError, r"extras\[0\] must be a tensor", (torch.zeros(5, 2), torch.tensor([0]), 3)),
        (ValueError, "on the device of tokens", (torch.zeros(5, 2), torch.zeros(1, dtype=torch.int64, device="meta"))),
    ],
)
def test_bad_input(error, match, arguments):
    with pytest.raises(error, match=match):
        qts_kernels.gather_tokens(*arguments)


def test_topn_gather_wants_tokens_that_fit_the_scores():
    with pytest.raises(ValueError, match=r"tokens must have the leading shape of scores, \[2, 5\], got \[5, 4\]"):
        qts_kernels.topn_gather(torch.zeros(5, 4), torch.zeros(2, 5), 1)
    with pytest.raises(ValueError, match=r"extras\[0\] must have the leading shape of scores"):
        qts_kernels.topn_gather(torch.zeros(2, 5, 4), torch.zeros(2, 5), 1, torch.zeros(5))
