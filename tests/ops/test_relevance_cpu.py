"""The C++ code of relevance: every instruction set, option and odd shape against the reference, and what it promises
beyond it. Run as a script it makes the sweep alone, for the instruction set that QTS_CPU_ISA names."""

import itertools
import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import check_sweep, run_with

import qts_kernels
from qts_kernels import _native
from qts_kernels.ops.relevance import reference
from qts_kernels.testing import assert_within_budget, make_relevance_inputs, poisoned_memory, ragged_cu_seqlens

pytestmark = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A head size for each at which the best copy of the code serves small problems too: AMX is left to heads from 32 on.
HEAD_DIMS = {torch.float32: 8, torch.bfloat16: 36, torch.float16: 8}
# Queries and keys of the segments, heads, key heads, head size: tails of tiles, panels, chunks and vectors.
SHAPES = [
    ([1], [1], 1, 1, 1),
    ([3, 0, 2], [50, 4, 0], 4, 2, 16),
    ([5, 1, 9], [49, 97, 3], 3, 3, 5),
    ([2, 7], [1700, 130], 6, 1, 33),
    ([1], [800], 14, 2, 64),
    ([4], [47], 2, 1, 129),
    ([130], [4100], 3, 1, 4),
    ([5, 2], [70, 65], 8, 4, 72),
    ([1], [129], 16, 2, 80),
    ([17], [64], 3, 1, 100),
    ([9, 40], [200, 3], 2, 2, 32),
]


def native(*args):
    with poisoned_memory():
        return torch.ops.qts_kernels_native.relevance.default(*args)


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def arguments(shape, dtype=torch.float32, *, reduce="max", causal=False, scaled=True, columns=None, seed=0):
    queries, keys, heads, kv_heads, head_dim = shape
    x = make_relevance_inputs(queries, keys, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, seed=seed)
    start = cu = None
    total = sum(keys)
    if columns == "some":
        start = torch.tensor([n // 3 for n in keys], dtype=torch.int32)
        cu = ragged_cu_seqlens([(n + 1) // 2 for n in keys])
        total = int(cu[-1])
    key_scale = x["key_scale"] if scaled else None
    cu_q, cu_k = x["cu_seqlens_q"], x["cu_seqlens_k"]
    return [x["query"], x["key"], key_scale, cu_q, cu_k, start, cu, total, reduce, head_dim**-0.5, causal, True]


def check(args):
    scores, lse, argrow = native(*args)
    rough, exact = reference.relevance(*args), reference.relevance(*double(args))
    assert_within_budget(scores, rough[0], exact[0])
    assert_within_budget(lse, rough[1], exact[1], atol=1e-5)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert argrow.shape == rough[2].shape
    if argrow.numel():
        attained = weights_at(args, argrow)
        assert_within_budget(attained, rough[0], exact[0])


def weights_at(args, argrow):
    """The fp64 weights of each column at the row that argrow names."""
    query, key, key_scale, cu_q, cu_k, start, cu, _, _, scale, causal, _ = double(args)
    rows, weights = query.shape[0], torch.zeros(argrow.shape, dtype=torch.float64)
    for q, k, columns, out in reference.segments(cu_q, cu_k, start, cu):
        length = q.stop - q.start
        if length == 0 or out.start == out.stop:
            continue
        part = None if key_scale is None else key_scale[k]
        p = reference.segment_logits(query[q], key[k], part, scale, causal).softmax(-1).nan_to_num(0)
        row = argrow[out] // rows * length + argrow[out] % rows - q.start
        weights[out] = p[:, :, columns].flatten(0, 1).gather(0, row[None])[0]
    return weights


def check_subnormals():
    """vdpbf16ps and the AMX tiles take subnormal bf16 for zero; the other copies don't."""
    args = arguments(([30], [100], 4, 2, 64), torch.bfloat16)
    args[0] *= 1e9
    args[1][::3] *= 1e-39
    tiny = args[1].float().abs() < torch.finfo(torch.bfloat16).tiny
    assert tiny.any()
    assert (args[1][tiny] != 0).any()
    got = native(*args)
    if os.environ.get("QTS_CPU_ISA") in ("avx512_bf16", "amx_bf16"):
        args[1] = args[1].masked_fill(tiny, 0)
        assert all(torch.equal(a, b) for a, b in zip(got, native(*args), strict=True))
    else:
        check(args)


def sweep():
    check_subnormals()
    options = itertools.product(DTYPES, SHAPES, ("max", "mean"), (False, True), (False, True), (None, "some"))
    for dtype, shape, reduce, causal, scaled, columns in options:
        if shape[1][0] > 1000 and (dtype == torch.float16 or scaled != causal):
            continue  # the reference is slow
        check(arguments(shape, dtype, reduce=reduce, causal=causal, scaled=scaled, columns=columns))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_every_instruction_set_within_budget(isa):
    check_sweep(isa, __file__)


def test_an_unknown_instruction_set_raises():
    done = run_with("avx1024", __file__)
    assert done.returncode != 0
    assert "QTS_CPU_ISA must be portable, avx2, avx512, avx512_bf16 or amx_bf16, got avx1024" in done.stderr


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 120)), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (2, 1), (5, 5), (6, 2)]),
    st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 72, 96, 100, 129])),
    st.sampled_from(DTYPES),
    st.sampled_from(["max", "mean"]),
    st.booleans(),
    st.sampled_from([None, "some"]),
    st.integers(0, 1000),
)
def test_ragged_segments(lengths, heads, head_dim, dtype, reduce, causal, columns, seed):
    shape = (*map(list, zip(*lengths, strict=True)), *heads, head_dim)
    check(arguments(shape, dtype, reduce=reduce, causal=causal, columns=columns, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_threads_do_not_change_a_bit(dtype, reduce):
    args = arguments(([3, 9], [5000, 300], 4, 2, 40), dtype, reduce=reduce)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(native(*args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_columns_are_the_bits_of_the_whole(reduce):
    shape = ([4], [3000], 4, 2, 24)
    whole = native(*arguments(shape, reduce=reduce))
    part = native(*arguments(shape, reduce=reduce, columns="some"))
    assert torch.equal(part[0], whole[0][1000:2500])
    if reduce == "max":
        assert torch.equal(part[2], whole[2][1000:2500])


def many_keys(kind, causal=False, keys=5000, dtype=torch.float32):
    """Enough keys and rows for the second pass to compute candidates alone."""
    args = arguments(([32], [keys], 16, 2, HEAD_DIMS[dtype]), dtype, causal=causal)
    query, key, key_scale = args[:3]
    if kind == "sharp":  # a row's weight lies on few keys
        query *= 8
    elif kind == "unlike the sample":  # every 16th key, which the estimates are taken from, is another kind of key
        key[::16] *= 6
    elif kind == "one of a kind":
        key[keys * 6 // 7] *= 12
    elif kind == "equal rows":
        query[16:] = query[:16]
        query[:, 1::2] = query[:, 0::2]
    elif kind == "equal keys":
        key[:] = key[:1]
        key_scale[:] = 1
    elif kind == "rising":  # every row's maximum, all along the keys
        query.abs_()
        key.abs_().mul_(torch.linspace(0, 30, keys)[:, None, None])
    elif kind == "unseen":
        key_scale[keys // 5 : keys * 3 // 5] = 0
    return args


KINDS = ["plain", "sharp", "unlike the sample", "one of a kind", "equal rows", "equal keys", "rising", "unseen"]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [768, 1001, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_have_the_bits_of_every_row(kind, dtype, keys, causal):
    args = many_keys(kind, causal, keys, dtype)
    check(args)
    whole, some = native(*args), keys * 12 // 25
    for begin in (0, some):  # less than half of the columns: every row is computed
        args[5], args[6] = torch.tensor([begin], dtype=torch.int32), torch.tensor([0, some], dtype=torch.int32)
        args[7] = some
        part = native(*args)
        assert torch.equal(part[0], whole[0][begin : begin + some])
        assert torch.equal(part[1], whole[1])
        assert torch.equal(part[2], whole[2][begin : begin + some])
        args[11] = False
        assert torch.equal(native(*args)[0], part[0])
        args[11] = True


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    args = arguments(([5], [70], 4, 2, 7), dtype)
    want = native(*args)
    for name in ("heads first", "head size first"):
        order = (1, 0, 2) if name == "heads first" else (2, 0, 1)
        back = (1, 0, 2) if name == "heads first" else (1, 2, 0)
        query, key = (x.permute(order).contiguous().permute(back) for x in args[:2])
        assert not query.is_contiguous()
        got = native(query, key, args[2].repeat_interleave(2)[::2], *args[3:])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), name


def test_a_key_beyond_2_31_elements():
    apart = 2**31 + 8
    memory = torch.empty(apart + 8, dtype=torch.bfloat16)  # 4 GiB of addresses, of which two pages are touched
    key = memory.as_strided((2, 1, 8), (apart, 8, 1))
    key.copy_(torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)))
    args = arguments(([3], [2], 2, 1, 8), torch.bfloat16)
    got = native(args[0], key, *args[2:])
    want = native(args[0], key.contiguous(), *args[2:])
    assert torch.equal(got[0], want[0])


def test_the_lowest_of_equal_rows_is_named():
    args = arguments(([6], [300], 4, 2, 16))
    args[0][3:] = args[0][:3]
    args[0][:, 1] = args[0][:, 0]
    _, _, argrow = native(*args)
    assert (argrow % 6 < 3).all()
    assert (argrow // 6 != 1).all()


def poisons():
    nan, inf = float("nan"), float("inf")
    for reduce, causal in itertools.product(("max", "mean"), (False, True)):
        for name, where, value in [
            ("key", (7, 1), nan),
            ("key", (69, 0), nan),
            ("query", (2, 3), nan),
            ("key_scale", (5,), nan),
            ("key", (3, 0, 2), inf),
            ("key_scale", (9,), inf),
            ("query", (1, 1), inf),
            ("key_scale", slice(None), -inf),
        ]:
            yield pytest.param(reduce, causal, name, where, value, id=f"{reduce}-{causal}-{name}-{where}-{value}")


@pytest.mark.parametrize("reduce,causal,name,where,value", list(poisons()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_go_where_the_reference_sends_them(dtype, reduce, causal, name, where, value):
    args = arguments(([5, 2], [70, 20], 4, 2, HEAD_DIMS[dtype]), dtype, reduce=reduce, causal=causal)
    args[{"query": 0, "key": 1, "key_scale": 2}[name]][where] = value
    got, want = native(*args), reference.relevance(*args)
    for ours, theirs in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_columns_outside_of_a_segment_raise():
    args = arguments(([2], [10], 2, 1, 4), columns="some")
    args[5] = torch.tensor([8], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="columns of segment 0 must lie in its 10 keys, got 8 to 13"):
        native(*args)


def test_it_serves_the_public_function():
    args = arguments(([3], [40], 4, 2, 16))
    got = qts_kernels.relevance(args[0][None], args[1][None], key_scale=args[2][None])
    assert torch.equal(got[0], native(*args)[0])


if __name__ == "__main__":
    reason = _native.absent("_C")
    if reason is not None:
        sys.exit(reason)
    torch.set_num_threads(1)  # the sweep is many small problems
    sweep()
