"""Repeated bipartite soft matching in rounds that the host knows: nothing synchronises, nothing is added by atomics.

A frame either halves in a round or is done after it. So all frames that take part in a round have the same length,
N halved and rounded up, round after round; a frame takes part while its count is below that, which programs read on the
device. A round is: inverse norms; the most similar odd token of each even one, where similarities stay in registers;
the rank of each even token; the slot that each token goes to; and, for frames with another round, the means. Tokens are
sorted by their slots (stable), so that each mean sums its members in the frame's order: the same bits on every run.

Products of 16-bit tokens are exact in fp32, and both norms are multiplied afterwards: such frames take the tensor cores
in the first round, which is three quarters of the work. Means and fp32 tokens are multiplied in full fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops import _triton_common as common

MAX_COLUMNS = 1024  # that a program takes of a row
SCAN = 512  # tokens of a frame that a program takes at once
RANKS = 32


@triton.jit(do_not_specialize=["length"])
def _inverse_norms(x, wanted, inverse_norm, length, columns, BLOCK: tl.constexpr):
    """[T, length]: 1 over the norm of each row, 0 where that is 0."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(wanted + row // length) < length:
        square = tl.zeros([BLOCK], tl.float32)
        for first in range(0, columns, BLOCK):
            column = first + tl.arange(0, BLOCK)
            value = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
            square += value * value
        norm = tl.sqrt_rn(tl.sum(square, 0))
        tl.store(inverse_norm + row, tl.where(norm == 0.0, 0.0, 1.0 / norm))


@triton.jit(do_not_specialize=["length"])
def _match(
    x, wanted, inverse_norm, best, similarity, length, columns,
    EVEN: tl.constexpr, ODD: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """best, similarity [T, evens]: the first of the most similar odd tokens; NaN counts as -inf."""
    evens = (length + 1) // 2
    blocks = tl.cdiv(evens, EVEN)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    if tl.load(wanted + frame) < length:
        even = tl.program_id(0) % blocks * EVEN + tl.arange(0, EVEN)
        inside = even < evens
        # Rows behind the end repeat the last one: what they give is not stored, or masked.
        left_row = x + (frame * length + tl.minimum(2 * even, 2 * evens - 2)) * columns
        left_norm = tl.load(inverse_norm + frame * length + 2 * even, mask=inside, other=0.0)
        most = tl.full([EVEN], float("-inf"), tl.float32)
        which = tl.zeros([EVEN], tl.int32)
        for first in range(0, length // 2, ODD):
            odd = first + tl.arange(0, ODD)
            known = odd < length // 2
            right_row = x + (frame * length + tl.minimum(2 * odd + 1, length // 2 * 2 - 1)) * columns
            product = tl.zeros([EVEN, ODD], tl.float32)
            for start in range(0, columns, DEPTH):
                column = start + tl.arange(0, DEPTH)
                left = tl.load(left_row[:, None] + column[None, :], mask=(column < columns)[None, :], other=0.0)
                right = tl.load(right_row[None, :] + column[:, None], mask=(column < columns)[:, None], other=0.0)
                product = tl.dot(left, right, product, input_precision="ieee")
            right_norm = tl.load(inverse_norm + frame * length + 2 * odd + 1, mask=known, other=0.0)
            found = product * left_norm[:, None] * right_norm[None, :]
            found = tl.where(known[None, :] & (found == found), found, float("-inf"))
            top = tl.max(found, 1)
            place = tl.min(tl.where(found == top[:, None], odd[None, :], length), 1)
            which = tl.where(top > most, place, which)
            most = tl.maximum(top, most)
        tl.store(best + frame * evens + even, which, mask=inside)
        tl.store(similarity + frame * evens + even, most, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _ranks(similarity, wanted, rank, length, BLOCK: tl.constexpr):
    """rank [T, evens]: how many even tokens come before each one, by falling similarity and rising position."""
    evens = (length + 1) // 2
    blocks = tl.cdiv(evens, BLOCK)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    if tl.load(wanted + frame) < length:
        token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        own = tl.load(similarity + frame * evens + token, mask=token < evens, other=0.0)
        before = tl.zeros([BLOCK], tl.int32)
        for first in range(0, evens, BLOCK):
            other = first + tl.arange(0, BLOCK)
            score = tl.load(similarity + frame * evens + other, mask=other < evens, other=float("-inf"))
            tie = (score[None, :] == own[:, None]) & (other[None, :] < token[:, None])
            before += tl.sum(((score[None, :] > own[:, None]) | tie).to(tl.int32), 1)
        tl.store(rank + frame * evens + token, before, mask=token < evens)


@triton.jit(do_not_specialize=["length"])
def _targets(best, rank, wanted, gone_until, target, length, COMPAT: tl.constexpr, BLOCK: tl.constexpr):
    """target [T, length]: the slot that each token goes to. gone_until [T, evens]: how many even tokens up to this one
    are merged. A program takes a frame."""
    frame = tl.program_id(0).to(tl.int64)
    count = tl.load(wanted + frame)
    evens = (length + 1) // 2
    lane = tl.arange(0, BLOCK)
    best += frame * evens
    rank += frame * evens
    gone_until += frame * evens
    target += frame * length
    if count < length:
        merged = tl.minimum(length // 2, length - count).to(tl.int32)
        gone_before = tl.zeros((), tl.int32)
        for first in range(0, evens, BLOCK):
            even = first + lane
            gone = (tl.load(rank + even, mask=even < evens, other=length) < merged).to(tl.int32)
            tl.store(gone_until + even, gone_before + tl.cumsum(gone, 0), mask=even < evens)
            gone_before += tl.sum(gone, 0)
        tl.debug_barrier()
        for first in range(0, evens, BLOCK):
            token = first + lane
            inside = token < evens
            order = tl.load(rank + token, mask=inside, other=0)
            host = tl.load(best + token, mask=inside, other=0)
            until = tl.load(gone_until + token, mask=inside, other=0)
            if COMPAT:  # what stays of the even positions, by falling similarity, then the odd ones
                even_slot = tl.where(order < merged, evens - merged + host, order - merged)
                odd_slot = evens - merged + token
            else:
                host_slot = 2 * host + 1 - tl.load(gone_until + host, mask=inside, other=0)
                even_slot = tl.where(order < merged, host_slot, 2 * token - until)
                odd_slot = 2 * token + 1 - until
            tl.store(target + 2 * token, even_slot, mask=inside)
            tl.store(target + 2 * token + 1, odd_slot, mask=token < length // 2)


@triton.jit(do_not_specialize=["tokens", "length"])
def _follow(target, members, wanted, slot, share, tokens, length, COMPAT: tl.constexpr, BLOCK: tl.constexpr):
    """slot [T, tokens]: where each of the frame's own tokens is after this round. Where COMPAT, share: its weight
    there, in means that forget the sizes."""
    blocks = tl.cdiv(tokens, BLOCK)
    frame = (tl.program_id(0) // blocks).to(tl.int64)
    if tl.load(wanted + frame) < length:
        token = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = token < tokens
        held = slot + frame * tokens + token
        place = tl.load(target + frame * length + tl.load(held, mask=inside, other=0), mask=inside, other=0)
        tl.store(held, place, mask=inside)
        if COMPAT:
            start = members + frame * (length + 1) + place
            count = tl.load(start + 1, mask=inside, other=1) - tl.load(start, mask=inside, other=0)
            before = tl.load(share + frame * tokens + token, mask=inside, other=0.0)
            tl.store(share + frame * tokens + token, before / count.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _means(
    x, weights, order, members, wanted, means, merged_weights, length, columns,
    COMPAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """means [T, (length + 1) // 2, columns] and the sums of their weights (1 where COMPAT), of frames that go on."""
    kept = (length + 1) // 2
    blocks = tl.cdiv(columns, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    frame = row // kept
    if tl.load(wanted + frame) < kept:
        start = tl.load(members + frame * (length + 1) + row % kept)
        stop = tl.load(members + frame * (length + 1) + row % kept + 1)
        whole = tl.zeros((), tl.float32)
        for member in range(start, stop):
            whole += tl.load(weights + frame * length + tl.load(order + frame * length + member))
        column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        mean = tl.zeros([BLOCK], tl.float32)
        for member in range(start, stop):
            token = frame * length + tl.load(order + frame * length + member)
            value = tl.load(x + token * columns + column, mask=column < columns, other=0.0).to(tl.float32)
            mean += value * (tl.load(weights + token) / whole)
        tl.store(means + row * columns + column, mean, mask=column < columns)
        if tl.program_id(0) % blocks == 0:
            tl.store(merged_weights + row, tl.where(COMPAT, 1.0, whole))


@triton.jit(do_not_specialize=["frames", "tokens"])
def _write(
    x, sizes, held_shares, order, members, cu_seqlens, out, out_sizes, rows, shares, frames, tokens, columns,
    COMPAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row of the result from the frame's own tokens, and their row and weight; zeros behind the last one."""
    blocks = tl.maximum(tl.cdiv(columns, BLOCK), 1)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    frame = common.segment_of_rows(cu_seqlens, frames, row.to(tl.int32)).to(tl.int64)
    slot = row - tl.load(cu_seqlens + frame)
    start = tl.zeros((), tl.int32)
    stop = tl.zeros((), tl.int32)
    if (row < tl.load(cu_seqlens + frame + 1)) & (slot >= 0) & (slot < tokens):
        start = tl.load(members + frame * (tokens + 1) + slot)
        stop = tl.load(members + frame * (tokens + 1) + slot + 1)
    whole = tl.zeros((), tl.float32)
    for member in range(start, stop):
        whole += tl.load(sizes + frame * tokens + tl.load(order + frame * tokens + member))
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for member in range(start, stop):
        token = frame * tokens + tl.load(order + frame * tokens + member)
        if COMPAT:
            share = tl.load(held_shares + token)
        else:
            share = tl.load(sizes + token) / whole
        total += tl.load(x + token * columns + column, mask=column < columns, other=0.0).to(tl.float32) * share
        if tl.program_id(0) % blocks == 0:
            tl.store(rows + token, row)
            tl.store(shares + token, share)
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=column < columns)
    if tl.program_id(0) % blocks == 0:
        tl.store(out_sizes + row, whole)


def _match_tiles(x: Tensor, length: int) -> dict[str, int]:
    """Tiles of even tokens, odd tokens and columns. Chosen by registers and shared memory, not yet by time."""
    if x.dtype == torch.float32:
        # Products in full fp32 run on the FMA units and hold their operands in registers.
        side, depth, warps, stages = 64, 32, 4, 2
    else:
        side, depth, warps, stages = (64, 64, 4, 2) if common.is_amd() else (128, 64, 8, 3)
    side = min(side, max(16, triton.next_power_of_2((length + 1) // 2)))
    depth = min(depth, max(16, triton.next_power_of_2(x.shape[2])))
    return {"EVEN": side, "ODD": side, "DEPTH": depth, "num_warps": warps if side > 32 else 4, "num_stages": stages}


def _members(slot: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The tokens of each frame sorted by their slots, and where those of each slot start: [T, slots + 1]."""
    ascending, order = slot.sort(dim=1, stable=True)
    bounds = torch.arange(slots + 1, dtype=torch.int32, device=slot.device).expand(slot.shape[0], -1)
    return order, torch.searchsorted(ascending, bounds.contiguous(), out_int32=True)


def _match_tokens(x: Tensor, wanted: Tensor, compat: bool) -> Tensor:
    """The slot that each token goes to in one round: int32 [T, length], of frames that take part."""
    frames, length, columns = x.shape
    evens = (length + 1) // 2

    def empty(entries: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(frames, entries, dtype=dtype, device=x.device)

    inverse_norm, similarity = empty(length, torch.float32), empty(evens, torch.float32)
    best, rank, gone_until, target = (empty(n, torch.int32) for n in (evens, evens, evens, length))
    tiles = _match_tiles(x, length)
    _inverse_norms[(frames * length,)](x, wanted, inverse_norm, length, columns, BLOCK=_block(columns), num_warps=4)
    _match[(frames * triton.cdiv(evens, tiles["EVEN"]),)](
        x, wanted, inverse_norm, best, similarity, length, columns, **tiles
    )
    _ranks[(frames * triton.cdiv(evens, RANKS),)](similarity, wanted, rank, length, BLOCK=RANKS, num_warps=4)
    _targets[(frames,)](best, rank, wanted, gone_until, target, length, COMPAT=compat, BLOCK=SCAN, num_warps=4)
    return target


def _block(columns: int) -> int:
    return min(MAX_COLUMNS, max(32, triton.next_power_of_2(columns)))


def merge_tokens(
    frames: Tensor, counts: Tensor, cu_seqlens: Tensor, sizes: Tensor | None, total: int, compat: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``qts_kernels.merge_tokens``. Beside the result it holds fp32 means of three quarters of the tokens."""
    common.check_dtype("frames", frames)
    count, tokens, columns = frames.shape
    frames, cu_seqlens = frames.contiguous(), cu_seqlens.contiguous()
    sizes = torch.ones(count, tokens, device=frames.device) if sizes is None else sizes.contiguous()
    out = torch.empty(total, columns, dtype=frames.dtype, device=frames.device)
    out_sizes = torch.empty(total, dtype=torch.float32, device=frames.device)
    rows = torch.full((count, tokens), -1, dtype=torch.int64, device=frames.device)
    shares = torch.zeros(count, tokens, device=frames.device)
    if count == 0:
        return out.zero_(), out_sizes.zero_(), rows, shares
    # A frame without a row in the result takes part in no round.
    wanted = torch.where(cu_seqlens.diff() > 0, counts.clamp(1, max(tokens, 1)), tokens)
    slot = torch.arange(tokens, dtype=torch.int32, device=frames.device).repeat(count, 1)
    held_shares = torch.ones(count, tokens, device=frames.device)
    x, weights, length, block = frames, sizes, tokens, _block(columns)
    blocks = triton.cdiv(columns, block)
    with common.on_device_of(frames):
        while length > 1:
            target = _match_tokens(x, wanted, compat)
            order, members = _members(target, length)
            _follow[(count * triton.cdiv(tokens, SCAN),)](
                target, members, wanted, slot, held_shares, tokens, length, COMPAT=compat, BLOCK=SCAN, num_warps=4
            )
            kept = (length + 1) // 2
            if kept > 1:
                means = torch.empty(count, kept, columns, dtype=torch.float32, device=frames.device)
                merged_weights = torch.empty(count, kept, device=frames.device)
                _means[(count * kept * blocks,)](
                    x, weights, order, members, wanted, means, merged_weights, length, columns,
                    COMPAT=compat, BLOCK=block, num_warps=4,
                )  # fmt: skip
                x, weights = means, merged_weights
            length = kept
        order, members = _members(slot, tokens)
        _write[(total * max(blocks, 1),)](
            frames, sizes, held_shares, order, members, cu_seqlens, out, out_sizes, rows, shares, count, tokens,
            columns, COMPAT=compat, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out, out_sizes, rows, shares
