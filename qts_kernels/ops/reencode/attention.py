"""The re-encoder's attention: bidirectional, over packed segments. The one place where its backend is chosen."""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from qts_kernels._checks import check_cu_seqlens, check_same, check_same_segments, check_shape, check_tensor
from qts_kernels._segments import segment_ids

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionBackend:
    """What computes ``varlen_attention``, and why that."""

    name: str
    """"flash-attn", "torch.varlen_attn", or "SDPA"."""
    reason: str


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v within each segment: no mask, no positions, H a multiple of Hkv (GQA).

    Args:
        query: [N, H, Dh] float32, bfloat16 or float16 (float64 for checking).
        key, value: [Nk, Hkv, Dh], dtype of query.
        cu_seqlens: int32 [S+1] offsets of the segments in query.
        max_seqlen: at least the longest segment of query.
        cu_seqlens_k, max_seqlen_k: the same for key and value; None: those of query.

    Returns:
        [N, H, Dh], differentiable. Zeros in rows behind ``cu_seqlens[-1]`` (where the counts were decided on the
        device, those are padding) and in a segment without keys. Rows behind the last offset get no gradient, whatever
        they hold. Nothing synchronises on a GPU.

    Raises:
        ValueError, TypeError: on shapes, heads, dtypes, devices or cu_seqlens that do not fit.
    """
    cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    max_seqlen_k = max_seqlen if max_seqlen_k is None else max_seqlen_k
    _check(query, key, value, cu_seqlens, cu_seqlens_k)
    if query.shape[0] == 0 or key.shape[0] == 0:
        return torch.zeros_like(query)
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        return _sdpa_segments(query, key, value, cu_seqlens.tolist(), cu_seqlens_k.tolist())
    backend = attention_backend(query.device, query.dtype, query.shape[2])
    if backend.name == "SDPA":
        return _sdpa_padded(query, key, value, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    # Both kernels leave rows behind the last offset unwritten, in the result and in the gradients.
    used, used_k = _used(query, cu_seqlens), _used(key, cu_seqlens_k)
    if torch.is_grad_enabled():
        query, key, value = query.where(used, 0), key.where(used_k, 0), value.where(used_k, 0)
    run = _flash_attn if backend.name == "flash-attn" else _torch_varlen
    return run(query, key, value, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k).where(used, 0)


def attention_backend(device: torch.device | str, dtype: torch.dtype, head_dim: int = 128) -> AttentionBackend:
    """What serves ``varlen_attention`` for tensors of this device and dtype: flash-attn, else torch's own
    variable-length attention (the same algorithm), else SDPA."""
    device = torch.device(device)
    if device.type != "cuda":
        return AttentionBackend("SDPA", f"the others run on CUDA tensors, got {device.type}")
    if dtype not in HALF:
        return AttentionBackend("SDPA", f"the others take bfloat16 or float16, got {str(dtype).removeprefix('torch.')}")
    if head_dim > 256 or head_dim % 8:
        return AttentionBackend("SDPA", f"the others take head sizes up to 256 in steps of 8, got {head_dim}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return AttentionBackend("SDPA", f"the others need compute capability 8.0, got {'.'.join(map(str, capability))}")
    absent = _flash_attn_absent()
    if absent is None:
        return AttentionBackend("flash-attn", "first choice")
    return AttentionBackend("torch.varlen_attn", f"no flash-attn: {absent}")


# The mark of torch.compiler.assume_constant_result, which itself would import torch._dynamo, and Triton with it.
attention_backend._dynamo_marked_constant = True


@cache
def _flash_attn_absent() -> str | None:
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError as error:
        return f"it does not import ({error}); pip install flash-attn"
    return None


def _flash_attn(query, key, value, cu_q, max_q, cu_k, max_k) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(query, key, value, cu_q, cu_k, max_q, max_k)


def _torch_varlen(query, key, value, cu_q, max_q, cu_k, max_k) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Its contract asks for as many key heads as query heads.
    key, value = _expand_heads(query, key, value)
    return varlen_attn(query.contiguous(), key, value, cu_q, cu_k, max_q, max_k)


def _sdpa_segments(query: Tensor, key: Tensor, value: Tensor, offsets: list[int], offsets_k: list[int]) -> Tensor:
    """One SDPA a segment, or one for all where every segment has the same lengths."""
    key, value = _expand_heads(query, key, value)
    lengths = {(b - a, d - c) for (a, b), (c, d) in zip(pairwise(offsets), pairwise(offsets_k), strict=True)}
    if len(lengths) == 1 and min(*lengths) > 0:
        segments = len(offsets) - 1
        rows = [
            x[:last].unflatten(0, (segments, -1)).transpose(1, 2)
            for x, last in ((query, offsets[-1]), (key, offsets_k[-1]), (value, offsets_k[-1]))
        ]
        parts = [F.scaled_dot_product_attention(*rows).transpose(1, 2).flatten(0, 1)]
    else:
        parts = []
        for (a, b), (c, d) in zip(pairwise(offsets), pairwise(offsets_k), strict=True):
            if a == b or c == d:
                parts.append(query.new_zeros(b - a, *query.shape[1:]))
                continue
            rows = [x[None].transpose(1, 2) for x in (query[a:b], key[c:d], value[c:d])]
            parts.append(F.scaled_dot_product_attention(*rows)[0].transpose(0, 1))
    return torch.cat([*parts, query.new_zeros(query.shape[0] - offsets[-1], *query.shape[1:])])


def _sdpa_padded(query, key, value, cu_q, max_q, cu_k, max_k) -> Tensor:
    """Every segment padded to the longest: static shapes, so nothing has to be read from the device."""
    rows_q, _ = _padded_rows(cu_q, max_q, query.shape[0])
    rows_k, valid = _padded_rows(cu_k, max_k, key.shape[0])
    key, value = _expand_heads(query, key.where(_used(key, cu_k), 0), value.where(_used(value, cu_k), 0))
    # A segment without keys sees one of another segment, so that its softmax is defined; its rows are zeroed below.
    valid = valid | (torch.arange(max_k, device=query.device) == 0)
    out = F.scaled_dot_product_attention(
        query.where(_used(query, cu_q), 0)[rows_q].transpose(1, 2),
        key[rows_k].transpose(1, 2),
        value[rows_k].transpose(1, 2),
        attn_mask=valid[:, None, None, :],
    )
    row = torch.arange(query.shape[0], dtype=cu_q.dtype, device=query.device)
    segment = segment_ids(cu_q, query.shape[0]).clamp(max=cu_q.shape[0] - 2)
    place = (segment * max_q + row - cu_q[segment]).clamp(max=cu_q.shape[0] * max_q - max_q - 1)
    answered = _used(query, cu_q) & (cu_k.diff() > 0)[segment][:, None, None]
    return out.transpose(1, 2).flatten(0, 1)[place].where(answered, 0)


def _padded_rows(cu_seqlens: Tensor, longest: int, total: int) -> tuple[Tensor, Tensor]:
    """[S, longest]: the packed row at each place of each padded segment, and whether there is one."""
    place = torch.arange(longest, device=cu_seqlens.device)
    valid = place < cu_seqlens.diff()[:, None]
    return (cu_seqlens[:-1, None] + place).clamp(max=total - 1), valid


def _used(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[N, 1, 1] bool: rows before the last offset."""
    return (torch.arange(x.shape[0], device=x.device) < cu_seqlens[-1])[:, None, None]


def _expand_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    return (key, value) if group == 1 else (key.repeat_interleave(group, 1), value.repeat_interleave(group, 1))


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor) -> None:
    check_tensor("query", query, 3, "[N, H, Dh]")
    check_tensor("key", key, 3, "[Nk, Hkv, Dh]")
    check_tensor("value", value, 3, "[Nk, Hkv, Dh]")
    check_shape("value", value, key.shape, "[Nk, Hkv, Dh]")
    check_same("key", key, "query", query)
    check_same("value", value, "query", query)
    if query.shape[2] != key.shape[2]:
        raise ValueError(f"query and key must have the same head size, got {query.shape[2]} and {key.shape[2]}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"the query's heads must be a multiple of the key's, got {query.shape[1]} and {key.shape[1]}")
    check_cu_seqlens("cu_seqlens", cu_seqlens, "query", query)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "query", query)
    check_same_segments("cu_seqlens", cu_seqlens, "cu_seqlens_k", cu_seqlens_k)
