"""Top-n and the gather of its rows, together."""

from torch import Tensor

from qts_kernels.ops.gather_tokens.api import gather_tokens
from qts_kernels.ops.topn.api import topn
from qts_kernels.selection import Selection


def topn_gather(
    tokens: Tensor,
    scores: Tensor,
    n: int | Tensor,
    *extras: Tensor,
    cu_seqlens: Tensor | None = None,
    max_n: int | None = None,
) -> Selection:
    """The n best tokens of each segment, in ascending order, with what belongs to them: ``gather_tokens(tokens,
    topn(scores, n), *extras)``.

    Args:
        tokens: [B, M, D] with scores [B, M], [M, D] with scores [M], or [sum M, D] with scores [sum M] and
            ``cu_seqlens``.
        scores, n, cu_seqlens, max_n: as in ``topn``.
        extras: each [B, M, ...] or [sum M, ...].

    Returns:
        Selection with tokens [N, D], indices [N], cu_seqlens [S+1], scores and extras; padded rows are zeros.

    Raises:
        ValueError, TypeError: as ``topn`` and ``gather_tokens``, and where tokens or extras do not have the leading
            shape of scores.
    """
    lead = scores.ndim
    for name, x in (("tokens", tokens), *((f"extras[{i}]", e) for i, e in enumerate(extras))):
        if x.shape[:lead] != scores.shape:
            raise ValueError(f"{name} must have the leading shape of scores, {list(scores.shape)}, got {list(x.shape)}")
    indices, cu_seqlens_out = topn(scores, n, cu_seqlens=cu_seqlens, max_n=max_n)
    packed = [x.flatten(0, 1) if lead == 2 else x for x in (tokens, *extras)]
    rows = gather_tokens(packed[0], indices, *packed[1:])
    kept, *kept_extras = rows if extras else (rows,)
    return Selection(
        indices=indices,
        cu_seqlens=cu_seqlens_out,
        tokens=kept,
        scores=scores,
        n=cu_seqlens_out.diff().long(),
        extras=tuple(kept_extras),
    )
