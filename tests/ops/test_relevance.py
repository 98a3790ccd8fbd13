"""relevance: what it promises to its callers, on every device, against an independent fp64 oracle."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import qts_kernels
from qts_kernels.testing import assert_within_budget, make_relevance_inputs, poisoned_memory, ragged_cu_seqlens

GOLDEN = Path(__file__).parents[1] / "golden"


def oracle(query, key, *, reduce="max", scale=None, key_scale=None, causal=False):
    """One segment, row by row in fp64: [L, H, Dh], [M, Hkv, Dh] -> [M]."""
    length, heads, head_dim = query.shape
    keys = key.shape[0]
    scale = head_dim**-0.5 if scale is None else scale
    weights = []
    for h in range(heads):
        k = key[:, h * key.shape[1] // heads].double()
        for row in range(length):
            logits = k @ query[row, h].double() * scale
            if key_scale is not None:
                logits = logits * key_scale.double()
            seen = min(keys, row + 1 + keys - length) if causal else keys
            w = torch.zeros(keys, dtype=torch.float64, device=query.device)
            if seen > 0:
                w[:seen] = logits[:seen].softmax(0)
            weights.append(w)
    if not weights:
        return torch.zeros(keys, dtype=torch.float64, device=query.device)
    stacked = torch.stack(weights)
    return stacked.amax(0) if reduce == "max" else stacked.mean(0)


def eager(query, key, *, reduce="max", key_scale=None, causal=False):
    """The same in the input's own dtype, softmax in fp32, as the models' eager attention does it."""
    heads, length, keys = query.shape[1], query.shape[0], key.shape[0]
    if length == 0:
        return torch.zeros(keys, device=query.device)
    k = key.repeat_interleave(heads // key.shape[1], dim=1)
    logits = query.transpose(0, 1) @ k.permute(1, 2, 0) * query.shape[2] ** -0.5
    if key_scale is not None:
        logits = logits * key_scale.to(logits.dtype)
    if causal:
        row = torch.arange(length, device=query.device)[:, None] + keys - length
        logits = logits.masked_fill(torch.arange(keys, device=query.device) > row, -torch.inf)
    weights = logits.softmax(-1, dtype=torch.float32).nan_to_num(0).flatten(0, 1)
    return weights.amax(0) if reduce == "max" else weights.mean(0)


def split(x, cu_seqlens):
    return torch.tensor_split(x, cu_seqlens[1:-1].tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 2, 16), (3, 3, 5), (6, 1, 33)])
def test_ragged_segments(device, dtype, causal, reduce, scaled, heads, kv_heads, head_dim):
    lengths = ([3, 1, 7, 2], [130, 1, 5, 67])
    x = make_relevance_inputs(*lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=device)
    key_scale = x.pop("key_scale")
    key_scale = key_scale if scaled else None
    with poisoned_memory():
        ours = qts_kernels.relevance(**x, key_scale=key_scale, causal=causal, reduce=reduce)
    assert ours.dtype == torch.float32
    queries, keys = split(x["query"], x["cu_seqlens_q"]), split(x["key"], x["cu_seqlens_k"])
    parts = zip(queries, keys, split(ours, x["cu_seqlens_k"]), strict=True)
    scales = split(key_scale, x["cu_seqlens_k"]) if scaled else [None] * 4
    for (q, k, got), s in zip(parts, scales, strict=True):
        options = {"reduce": reduce, "causal": causal, "key_scale": s}
        assert_within_budget(got, eager(q, k, **options), oracle(q, k, **options))


def test_dense_equals_packed(device):
    x = make_relevance_inputs([5, 5], [40, 40], device=device)
    packed = qts_kernels.relevance(**x)
    dense = qts_kernels.relevance(
        x["query"].unflatten(0, (2, 5)), x["key"].unflatten(0, (2, 40)), key_scale=x["key_scale"].view(2, 40)
    )
    assert dense.shape == (2, 40)
    assert torch.equal(dense.flatten(), packed)


def test_a_segment_does_not_see_the_others(device):
    x = make_relevance_inputs([2, 3, 1], [9, 70, 33], device=device)
    together = split(qts_kernels.relevance(**x), x["cu_seqlens_k"])
    queries, keys = split(x["query"], x["cu_seqlens_q"]), split(x["key"], x["cu_seqlens_k"])
    scales = split(x["key_scale"], x["cu_seqlens_k"])
    for got, q, k, s in zip(together, queries, keys, scales, strict=True):
        alone = qts_kernels.relevance(q[None], k[None], key_scale=s[None])[0]
        torch.testing.assert_close(got, alone, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("causal", [False, True])
def test_columns_are_a_slice_of_all_scores(device, reduce, causal):
    x = make_relevance_inputs([4, 2, 0], [50, 31, 6], device=device)
    whole = qts_kernels.relevance(**x, reduce=reduce, causal=causal)
    parts = split(whole, x["cu_seqlens_k"])
    one = qts_kernels.relevance(**x, reduce=reduce, causal=causal, columns=(2, 5))
    torch.testing.assert_close(one, torch.cat([p[2:5] for p in parts]), rtol=1e-6, atol=0)
    pairs = [(0, 50), (31, 31), (1, 4)]
    each = qts_kernels.relevance(**x, reduce=reduce, causal=causal, columns=pairs)
    want = torch.cat([p[a:b] for p, (a, b) in zip(parts, pairs, strict=True)])
    torch.testing.assert_close(each, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "query_lengths,key_lengths", [([0], [5]), ([4], [0]), ([0, 2], [3, 0]), ([0], [0]), ([1], [1])]
)
def test_empty_segments(device, query_lengths, key_lengths):
    x = make_relevance_inputs(query_lengths, key_lengths, device=device)
    with poisoned_memory():
        scores = split(qts_kernels.relevance(**x), x["cu_seqlens_k"])
    for length, keys, got in zip(query_lengths, key_lengths, scores, strict=True):
        assert got.shape == (keys,)
        if length == 0:
            assert (got == 0).all()
        elif keys == 1:
            assert torch.allclose(got, torch.ones_like(got))


def test_causal_rows_that_see_no_key_take_no_part(device):
    x = make_relevance_inputs([5], [3], device=device)
    options = {"causal": True, "reduce": "mean"}
    got = qts_kernels.relevance(**x, **options)
    want = oracle(x["query"], x["key"], key_scale=x["key_scale"], **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    assert got.isfinite().all()


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_nan_in_a_key_reaches_its_segment_alone(device, reduce):
    x = make_relevance_inputs([3, 3], [40, 40], device=device)
    x["key"][7] = torch.nan
    first, second = split(qts_kernels.relevance(**x, reduce=reduce), x["cu_seqlens_k"])
    assert first.isnan().all()
    assert second.isfinite().all()


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_large_logits_do_not_overflow(device, reduce):
    x = make_relevance_inputs([4], [200], device=device)
    x["query"] *= 300
    x.pop("key_scale")
    got = qts_kernels.relevance(**x, reduce=reduce)
    want = oracle(x["query"], x["key"], reduce=reduce)
    # The row statistic is one fp32 number, max + log(sum), as flash attention's is: it carries the largest logit's
    # rounding.
    largest = (x["query"].norm(dim=-1).max() * x["key"].norm(dim=-1).max() / x["key"].shape[-1] ** 0.5).item()
    assert largest > 89, "exp must overflow fp32 without the subtraction of the maximum"
    atol = largest * torch.finfo(torch.float32).eps
    assert_within_budget(got, eager(x["query"], x["key"], reduce=reduce), want, atol=atol)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=5),
    st.sampled_from([(2, 1), (4, 4), (6, 2)]),
    st.integers(1, 20),
    st.integers(0, 1000),
)
def test_mean_sums_to_one_and_max_bounds_mean(lengths, heads, head_dim, seed):
    x = make_relevance_inputs(
        *zip(*lengths, strict=True), heads=heads[0], kv_heads=heads[1], head_dim=head_dim, seed=seed
    )
    mean = split(qts_kernels.relevance(**x, reduce="mean"), x["cu_seqlens_k"])
    best = split(qts_kernels.relevance(**x, reduce="max"), x["cu_seqlens_k"])
    for (length, keys), a, b in zip(lengths, mean, best, strict=True):
        if length and keys:
            assert abs(a.sum().item() - 1) < 1e-5
        assert (b >= a - 1e-6).all()
        assert (b <= 1 + 1e-6).all()


@pytest.mark.parametrize("name", ["mrope", "rope"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_golden_flexselect(device, name, reduce):
    with safe_open(GOLDEN / f"flexselect_{name}.safetensors", "pt", device=device) as f:
        config = json.loads(f.metadata()["config"])
        query, key, want = f.get_tensor("q"), f.get_tensor("k"), f.get_tensor(f"score_{reduce}")
    columns = (config["pre"], config["pre"] + config["vis"])
    got = qts_kernels.relevance(query.transpose(1, 2), key.transpose(1, 2), reduce=reduce, causal=True, columns=columns)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("columns", [None, (1, 6)])
def test_gradcheck(device, reduce, causal, columns):
    draw = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    query, key = torch.randn(2, 3, 4, 5, **draw), torch.randn(2, 7, 2, 5, **draw)
    inputs = [x.to(device).requires_grad_() for x in (query, key, torch.rand(2, 7, **draw))]

    def run(query, key, key_scale):
        return qts_kernels.relevance(query, key, key_scale=key_scale, reduce=reduce, causal=causal, columns=columns)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_gradients_within_budget(device, dtype, reduce):
    x = make_relevance_inputs([3, 1], [70, 41], dtype=dtype, device=device)
    cu_q, cu_k = x.pop("cu_seqlens_q"), x.pop("cu_seqlens_k")
    weight = torch.randn(111, generator=torch.Generator().manual_seed(1)).to(device)

    def gradients(run, cast):
        leaves = [
            v.detach().to(cast if n != "key_scale" else max(cast, torch.float32, key=_bits)) for n, v in x.items()
        ]
        leaves = [v.requires_grad_() for v in leaves]
        (run(*leaves) * weight).sum().backward()
        return [v.grad for v in leaves]

    def ours(query, key, key_scale):
        return qts_kernels.relevance(
            query, key, key_scale=key_scale, reduce=reduce, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
        )

    def plain(query, key, key_scale):
        parts = zip(split(query, cu_q), split(key, cu_k), split(key_scale, cu_k), strict=True)
        return torch.cat([_differentiable(q, k, s, reduce) for q, k, s in parts])

    got, rough, exact = gradients(ours, dtype), gradients(plain, dtype), gradients(plain, torch.float64)
    for a, b, c in zip(got, rough, exact, strict=True):
        assert_within_budget(a, b, c, atol=1e-5)


def _bits(dtype):
    return torch.finfo(dtype).bits


def _differentiable(query, key, key_scale, reduce):
    k = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.transpose(0, 1) @ k.permute(1, 2, 0) * query.shape[2] ** -0.5 * key_scale.to(query.dtype)
    weights = logits.softmax(-1, dtype=max(query.dtype, torch.float32, key=_bits)).flatten(0, 1)
    return weights.amax(0) if reduce == "max" else weights.mean(0)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_opcheck(device, reduce):
    x = make_relevance_inputs([3, 1], [9, 4], device=device)
    x["query"].requires_grad_()
    start = torch.tensor([1, 0], dtype=torch.int32, device=device)
    args = (x["query"], x["key"], x["key_scale"], x["cu_seqlens_q"], x["cu_seqlens_k"])
    for columns in ((None, None, 13), (start, ragged_cu_seqlens([3, 2], device), 5)):
        torch.library.opcheck(torch.ops.qts_kernels.relevance.default, (*args, *columns, reduce, 0.5, False, True))


def test_compiles_without_a_graph_break(device):
    x = make_relevance_inputs([3, 2], [20, 9], device=device)

    def run(query, key, key_scale, cu_q, cu_k):
        return qts_kernels.relevance(query, key, key_scale=key_scale, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k) * 2

    compiled = torch.compile(run, fullgraph=True)
    assert torch.equal(compiled(*x.values()), run(*x.values()))


def bad(query=(1, 2, 4, 8), key=(1, 5, 2, 8), dtype=torch.float32, **options):
    return torch.zeros(query, dtype=dtype), torch.zeros(key, dtype=dtype), options


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


PACKED = {"query": (3, 4, 8), "key": (5, 2, 8)}


@pytest.mark.parametrize(
    "call,error,message",
    [
        (bad(query=(2, 4, 8)), ValueError, r"query must have shape \[B, L, H, Dh\], got \[2, 4, 8\]"),
        (bad(key=(5, 2, 8)), ValueError, r"key must have shape \[B, M, Hkv, Dh\], got \[5, 2, 8\]"),
        (bad(key=(2, 5, 2, 8)), ValueError, "same batch, got 1 and 2"),
        (bad(key=(1, 5, 3, 8)), ValueError, "positive multiple of the key's, got 4 and 3"),
        (bad(key=(1, 5, 0, 8)), ValueError, "positive multiple"),
        (bad(key=(1, 5, 2, 7)), ValueError, "same head size, at least 1, got 8 and 7"),
        (bad(dtype=torch.int32), TypeError, "query must be float32 or bfloat16 or float16 or float64, got int32"),
        (bad(reduce="sum"), ValueError, "reduce must be 'max' or 'mean', got 'sum'"),
        (bad(key_scale=torch.ones(1, 4)), ValueError, r"key_scale must have shape \[B, M\] = \[1, 5\], got \[1, 4\]"),
        (bad(key_scale=torch.ones(1, 5).half()), TypeError, "key_scale must be float32, got float16"),
        (bad(columns=(2, 6)), ValueError, r"0 <= start <= stop <= 5, got \(2, 6\)"),
        (bad(columns=(-1, 2)), ValueError, r"got \(-1, 2\)"),
        (bad(columns=(3, 2)), ValueError, r"got \(3, 2\)"),
        (bad(columns=[(0, 1), (0, 1)]), ValueError, "one pair for each of 1 segments, got 2 pairs"),
        (bad(**PACKED, cu_seqlens_q=cu(0, 3)), ValueError, "got no cu_seqlens_k"),
        (
            bad(**PACKED, cu_seqlens_q=cu(0, 3), cu_seqlens_k=cu(0, 2, 5)),
            ValueError,
            "same number of segments, got 1 and 2",
        ),
        (
            bad(**PACKED, cu_seqlens_q=cu(0, 3), cu_seqlens_k=cu(0, 5, dtype=torch.int64)),
            TypeError,
            "must be int32, got int64",
        ),
        (
            bad(**PACKED, cu_seqlens_q=cu(0, 2, 1, 3), cu_seqlens_k=cu(0, 1, 2, 5)),
            ValueError,
            "must not decrease, got 2 before 1",
        ),
        (bad(**PACKED, cu_seqlens_q=cu(0, 3), cu_seqlens_k=cu(0, 4)), ValueError, "number of packed rows, 5, got 4"),
        (bad(**PACKED, cu_seqlens_q=cu(1, 3), cu_seqlens_k=cu(0, 5)), ValueError, "must start at 0, got 1"),
        (bad(**PACKED, cu_seqlens_q=cu(0, 3), cu_seqlens_k=cu(0, 5), columns=(0, 6)), ValueError, r"got \(0, 6\)"),
    ],
)
def test_bad_input_raises(call, error, message):
    query, key, options = call
    with pytest.raises(error, match=message):
        qts_kernels.relevance(query, key, **options)


def test_bad_tensors_raise():
    query, key, _ = bad()
    with pytest.raises(TypeError, match="query must be a tensor"):
        qts_kernels.relevance([1.0], key)
    with pytest.raises(TypeError, match="dtype of query"):
        qts_kernels.relevance(query, key.half())
    with pytest.raises(ValueError, match="device of query, cpu, got meta"):
        qts_kernels.relevance(query, key.to("meta"))
