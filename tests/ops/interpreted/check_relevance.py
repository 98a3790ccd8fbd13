"""relevance and its gradients in Triton's interpreter, against the reference in the same dtype and in float64."""

import itertools

import pytest
import torch

from qts_kernels.ops.relevance import reference
from qts_kernels.ops.relevance import triton as ours
from qts_kernels.testing import assert_within_budget, make_relevance_inputs, poisoned_memory, ragged_cu_seqlens

RAGGED = ([3, 0, 7, 2], [40, 9, 0, 150])
SHAPES = [RAGGED, ([1], [1]), ([70], [30]), ([5, 5], [129, 64])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = list(itertools.product(("max", "mean"), (False, True), (False, True), (False, True)))
HEADS = [(14, 2, 80), (3, 3, 5), (3, 1, 200)]


def inputs(lengths, dtype, key_scale, columns, heads=(4, 2, 16)):
    query_lengths, key_lengths = lengths
    made = make_relevance_inputs(
        query_lengths, key_lengths, heads=heads[0], kv_heads=heads[1], head_dim=heads[2], dtype=dtype
    )
    start = cu_columns = None
    total = sum(key_lengths)
    if columns:
        start = torch.tensor([min(2, length) for length in key_lengths], dtype=torch.int32)
        widths = [max(0, length - 3) for length in key_lengths]
        cu_columns, total = ragged_cu_seqlens(widths), sum(widths)
    tensors = (made["query"], made["key"], made["key_scale"] if key_scale else None)
    return tensors, (made["cu_seqlens_q"], made["cu_seqlens_k"], start, cu_columns), total


def exact(tensors):
    return [None if x is None else x.double() for x in tensors]


def check_forward(tensors, segments, total, reduce, causal, with_argrow, scale=0.5):
    rest = (*segments, total, reduce, scale, causal, with_argrow)
    with poisoned_memory():
        found = ours.relevance(*tensors, *rest)
    eager, truth = reference.relevance(*tensors, *rest), reference.relevance(*exact(tensors), *rest)
    assert_within_budget(found[0], eager[0], truth[0], atol=5e-7)
    assert_within_budget(found[1], eager[1], truth[1])
    assert found[2].shape == eager[2].shape
    return found, eager


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("reduce, causal, key_scale, columns", OPTIONS)
def test_options(dtype, reduce, causal, key_scale, columns):
    tensors, segments, total = inputs(RAGGED, dtype, key_scale, columns)
    for with_argrow in (False, True):
        found, eager = check_forward(tensors, segments, total, reduce, causal, with_argrow)
        # Random logits have no near-ties: the row that attains the maximum is the reference's.
        assert torch.equal(found[2], eager[2])


@pytest.mark.parametrize("lengths", SHAPES[1:])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(lengths, causal):
    tensors, segments, total = inputs(lengths, torch.float16, True, False)
    check_forward(tensors, segments, total, "max", causal, True)
    check_forward(tensors, segments, total, "mean", causal, False)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_heads_and_head_sizes(heads, dtype):
    tensors, segments, total = inputs(([9], [150]), dtype, True, False, heads)
    check_forward(tensors, segments, total, "max", True, True, scale=heads[2] ** -0.5)


def test_large_logits():
    tensors, segments, total = inputs(RAGGED, torch.float32, True, False)
    check_forward(tensors, segments, total, "max", True, True, scale=2.0)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_a_scale_that_is_not_positive(scale, causal):
    tensors, segments, total = inputs(RAGGED, torch.bfloat16, True, False)
    for reduce in ("max", "mean"):
        check_forward(tensors, segments, total, reduce, causal, False, scale=scale)


@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_keys_of_minus_infinity_weigh_nothing(reduce):
    tensors, segments, total = inputs(RAGGED, torch.float32, False, False)
    query, key, _ = tensors
    query[:, :, 0] = query[:, :, 0].abs() + 0.1
    key[5:9, :, 0] = -torch.inf
    found, _ = check_forward(tensors, segments, total, reduce, False, False)
    assert (found[0][5:9] == 0).all()


def test_strides():
    """Heads before tokens, and a head size that is not the last axis."""
    (query, key, _), segments, total = inputs(RAGGED, torch.float32, False, False)
    swapped = query.transpose(0, 1).contiguous().transpose(0, 1)
    turned = key.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not swapped.is_contiguous()
    assert turned.stride(-1) != 1
    check_forward((swapped, turned, None), segments, total, "max", False, True)


def test_ties_give_the_lowest_row():
    """Row 1 of each head repeats row 0, and head 2 repeats head 1's query on a key head of the same keys."""
    (query, key, _), segments, total = inputs(([4], [50]), torch.float32, False, False, (4, 2, 16))
    query[:] = query[:1, :1]
    key[:, 1] = key[:, 0]
    found = ours.relevance(query, key, None, *segments, total, "max", 0.5, False, True)
    assert torch.equal(found[2], torch.zeros(total, dtype=torch.int64))


@pytest.mark.parametrize("where", ["query", "key", "infinite key", "infinite scale"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_nan_stays_in_its_segment_and_is_not_lost(where, causal, reduce):
    tensors, segments, total = inputs(([3, 4], [40, 40]), torch.float32, True, False)
    query, key, scale = tensors
    if where == "query":
        query[1, 1, 1] = torch.nan
    elif where == "key":
        key[30, 1, 1] = torch.nan
    elif where == "infinite key":
        key[30, 1, 1] = torch.inf
    else:
        scale[30] = -torch.inf
    found, _ = check_forward(tensors, segments, total, reduce, causal, True)
    assert found[0][:40].isnan().any()
    assert not found[0][40:].isnan().any()
    assert found[2].numel() == 0 or (found[2].min() >= 0 and found[2].max() < query.shape[0] * query.shape[1])


def check_backward(tensors, segments, total, reduce, causal, scale=0.5):
    options = (reduce, scale, causal)
    grad = torch.randn(total, generator=torch.Generator().manual_seed(1))
    truth = reference.relevance(*exact(tensors), *segments, total, *options, True)
    mine = ours.relevance(*tensors, *segments, total, *options, True)
    eager = reference.relevance(*tensors, *segments, total, *options, True)
    # One choice of rows for all three, so that a near-tie does not send a gradient elsewhere.
    with poisoned_memory():
        found = ours.relevance_backward(grad, *tensors, *segments, mine[0], mine[1], truth[2], *options)
    eager = reference.relevance_backward(grad, *tensors, *segments, eager[0], eager[1], truth[2], *options)
    truth = reference.relevance_backward(grad.double(), *exact(tensors), *segments, *truth, *options)
    for name, a, b, c in zip(("query", "key", "key_scale"), found, eager, truth, strict=True):
        assert a.dtype == b.dtype, name
        assert_within_budget(a, b, c, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("causal, key_scale, columns", [(0, 0, 0), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
def test_gradients(dtype, reduce, causal, key_scale, columns):
    tensors, segments, total = inputs(RAGGED, dtype, key_scale, columns)
    check_backward(tensors, segments, total, reduce, bool(causal))


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("lengths", SHAPES[1:3])
def test_gradients_of_shapes(reduce, lengths):
    tensors, segments, total = inputs(lengths, torch.bfloat16, True, False)
    check_backward(tensors, segments, total, reduce, True)


@pytest.mark.parametrize("heads", HEADS[::2])
def test_gradients_of_head_sizes(heads):
    tensors, segments, total = inputs(([9], [70]), torch.bfloat16, True, False, heads)
    check_backward(tensors, segments, total, "max", False, scale=heads[2] ** -0.5)


def test_gradients_of_nothing():
    for lengths in (([0], [5]), ([3], [0]), ([0, 2], [4, 0])):
        tensors, segments, total = inputs(lengths, torch.float32, True, False)
        check_backward(tensors, segments, total, "max", False)
