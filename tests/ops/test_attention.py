"""Variable-length attention against plain attention, one segment at a time."""

import math

import pytest
import torch

from qts_kernels.ops.reencode import attention
from qts_kernels.ops.reencode.attention import attention_backend, varlen_attention
from qts_kernels.testing import assert_within_budget, poisoned_memory, ragged_cu_seqlens

LENGTHS = [([5, 1, 0, 12], None), ([7, 7, 7], None), ([4, 0, 3, 2], [9, 5, 0, 1]), ([6], None), ([0, 0], None)]


def draw(lengths, lengths_k, extra=0, heads=6, kv_heads=2, head_dim=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    total, total_k = sum(lengths) + extra, sum(lengths_k) + extra
    shapes = (total, heads, head_dim), (total_k, kv_heads, head_dim), (total_k, kv_heads, head_dim)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def plain(query, key, value, lengths, lengths_k):
    """softmax(q k^T / sqrt(Dh)) v, statistics in fp32 or better."""
    out, q, k = torch.zeros_like(query), 0, 0
    group = query.shape[1] // key.shape[1]
    for n, m in zip(lengths, lengths_k, strict=True):
        if n and m:
            rows = [x.repeat_interleave(group, 1).transpose(0, 1) for x in (key[k : k + m], value[k : k + m])]
            logits = query[q : q + n].transpose(0, 1) @ rows[0].mT / math.sqrt(query.shape[2])
            wide = torch.float64 if query.dtype == torch.float64 else torch.float32
            out[q : q + n] = (logits.to(wide).softmax(-1).to(query.dtype) @ rows[1]).transpose(0, 1)
        q, k = q + n, k + m
    return out


def run(query, key, value, lengths, lengths_k, how=varlen_attention):
    cu = ragged_cu_seqlens(lengths, query.device)
    cu_k = ragged_cu_seqlens(lengths_k, query.device)
    if how is varlen_attention:
        return how(query, key, value, cu, max(lengths), cu_seqlens_k=cu_k, max_seqlen_k=max(lengths_k))
    return how(query, key, value, cu, max(1, *lengths), cu_k, max(1, *lengths_k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths, lengths_k", LENGTHS)
def test_against_plain(device, lengths, lengths_k, dtype):
    lengths_k = lengths_k or lengths
    inputs = draw(lengths, lengths_k, dtype=dtype, device=device)
    with poisoned_memory():
        ours = run(*inputs, lengths, lengths_k)
    eager = plain(*inputs, lengths, lengths_k)
    exact = plain(*(x.double() for x in inputs), lengths, lengths_k)
    assert_within_budget(ours, eager, exact)


@pytest.mark.parametrize("lengths, lengths_k", LENGTHS[:4])
def test_padded_form_against_plain(device, lengths, lengths_k):
    """What serves float32 on a GPU, and torch.compile on a CPU: nothing is read from cu_seqlens."""
    lengths_k = lengths_k or lengths
    inputs = draw(lengths, lengths_k, device=device)
    ours = run(*inputs, lengths, lengths_k, how=attention._sdpa_padded)
    exact = plain(*(x.double() for x in inputs), lengths, lengths_k)
    assert_within_budget(ours, plain(*inputs, lengths, lengths_k), exact)


@pytest.mark.parametrize("how", [varlen_attention, attention._sdpa_padded], ids=["chosen", "padded"])
def test_rows_behind_the_last_offset(device, how):
    lengths, extra = [3, 0, 5], 4
    leaves = draw(lengths, lengths, extra, device=device)
    for x in leaves:
        x[8:] = float("nan")
        x.requires_grad_()
    out = run(*leaves, lengths, lengths, how=how)
    assert (out[8:] == 0).all()
    out.square().sum().backward()
    alone = [x.detach()[:8].clone().requires_grad_() for x in leaves]
    plain(*alone, lengths, lengths).square().sum().backward()
    for leaf, expected in zip(leaves, alone, strict=True):
        assert (leaf.grad[8:] == 0).all()
        torch.testing.assert_close(leaf.grad[:8], expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [varlen_attention, attention._sdpa_padded], ids=["chosen", "padded"])
def test_gradcheck(how):
    lengths, lengths_k = [2, 0, 3], [3, 1, 2]
    inputs = [x.requires_grad_() for x in draw(lengths, lengths_k, head_dim=4, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: run(*x, lengths, lengths_k, how=how), inputs, fast_mode=True)


def test_a_batch_has_the_bits_of_single_segments():
    lengths = [33, 33]
    inputs = draw(lengths, lengths)
    together = run(*inputs, lengths, lengths)
    for s in range(2):
        alone = run(*(x[33 * s : 33 * (s + 1)] for x in inputs), [33], [33])
        assert torch.equal(together[33 * s : 33 * (s + 1)], alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_kernels_leave_nothing_of_the_padding(dtype):
    lengths, extra = [130, 0, 61, 300], 77
    leaves = draw(lengths, lengths, extra, 16, 2, 128, dtype, "cuda")
    for x in leaves:
        x[491:] = float("nan")
        x.requires_grad_()
    with poisoned_memory():
        out = run(*leaves, lengths, lengths)
        out.square().sum().backward()
    assert (out[491:] == 0).all()
    exact = [x.detach()[:491].double().requires_grad_() for x in leaves]
    eager = [x.detach()[:491].clone().requires_grad_() for x in leaves]
    for rows in (exact, eager):
        plain(*rows, lengths, lengths).square().sum().backward()
    for leaf, e, x in zip(leaves, eager, exact, strict=True):
        assert (leaf.grad[491:] == 0).all()
        assert_within_budget(leaf.grad[:491], e.grad, x.grad, factor=3.0)


def test_the_choice_is_reported():
    assert attention_backend("cpu", torch.bfloat16).name == "SDPA"
    assert "got cpu" in attention_backend(torch.device("cpu"), torch.bfloat16).reason
    assert attention_backend("cuda", torch.float32).name == "SDPA"
    assert "got float32" in attention_backend("cuda", torch.float32).reason
    assert "got 512" in attention_backend("cuda", torch.float16, 512).reason


def test_the_choice_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert attention_backend("cuda", torch.float16).reason == "the others need compute capability 8.0, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(attention, "_flash_attn_absent", lambda: None)
    assert attention_backend("cuda", torch.float16).name == "flash-attn"
    monkeypatch.setattr(attention, "_flash_attn_absent", lambda: "it was not built")
    assert attention_backend("cuda", torch.float16) == attention.AttentionBackend(
        "torch.varlen_attn", "no flash-attn: it was not built"
    )


def test_bad_input():
    query, key, value = draw([4], [4])
    cu = ragged_cu_seqlens([4])
    for error, message, args in (
        (ValueError, r"query must have shape \[N, H, Dh\]", (query[0], key, value, cu, 4)),
        (ValueError, r"value must have shape", (query, key, value[:3], cu, 4)),
        (TypeError, "dtype of query", (query, key.double(), value.double(), cu, 4)),
        (ValueError, "multiple of the key's, got 5 and 2", (query[:, :5], key, value, cu, 4)),
        (ValueError, "same head size, got 7 and 8", (query[..., :7], key, value, cu, 4)),
        (TypeError, "cu_seqlens must be int32", (query, key, value, cu.long(), 4)),
    ):
        with pytest.raises(error, match=message):
            varlen_attention(*args)
    with pytest.raises(ValueError, match="same number of segments, got 1 and 2"):
        varlen_attention(query, key, value, cu, 4, cu_seqlens_k=ragged_cu_seqlens([2, 2]))
