"""What the kernels of relevance share: tile sizes, and tiles of logits.

The G query heads of one key head and the L query tokens of a segment are packed into rows: row r is token r % L of head
r // L of the group. A tile of logits is then one matrix product of at least 16 rows even where there is one token.
Rows and keys behind the end of a segment repeat its last one: loads need no mask, and what they give is not stored.

Kernels that stream rows past a tile of keys read them from a copy in that order, in which each segment starts at a
multiple of PACKED: an address is then one sum. Worked out from the query as it comes, the division by L, the clamping
and the 64-bit products of each row were two of three instructions of the loop.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from qts_kernels.ops import _triton_common as common
from qts_kernels.ops._triton_common import segment_bounds, segment_of_block

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
PACKED = 64  # a multiple of the rows of every tile that streams


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a kernel: packed query rows, keys, and the part of the head size that one product takes; and the
    most registers a thread may have, where that is set.

    Chosen by instructions, registers and shared memory, not yet by time. In 16 bits a tile of 128 stays and tiles of 64
    stream past: half the traffic of 64 by 64, and on Hopper two programs of 8 warps share a multiprocessor (128
    registers a thread and 64 KiB each), so that one's exponentials overlap the other's products.
    """

    rows: int
    keys: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None

    def constants(self) -> dict[str, int]:
        """As the kernels' constants and launch options."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_KEYS": self.keys,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **limit,
        }


def row_tiles(query: Tensor, rows: int) -> Tiles:
    """For kernels that keep a tile of rows and stream keys past it."""
    depth = _power_of_2(query.shape[2], 128)
    if query.dtype == torch.float32:
        # Products in full fp32 run on the FMA units and hold their operands in registers.
        return Tiles(_power_of_2(rows, 64), 64, min(depth, 32), 4, 2)
    block = _power_of_2(rows, 64 if common.is_amd() else 128)
    if block < 128:
        return Tiles(block, 64, depth, 4, 2)
    return Tiles(block, 64, depth, 8, 2, _shared_by_two(query))


def key_tiles(query: Tensor, rows: int) -> Tiles:
    """For kernels that keep a tile of keys and stream rows past it."""
    depth, block = _power_of_2(query.shape[2], 128), _power_of_2(rows, 64)
    if query.dtype == torch.float32:
        return Tiles(block, 64, min(depth, 32), 4, 2)
    if common.is_amd():
        return Tiles(block, 64, depth, 4, 2)
    if block < 64:
        return Tiles(block, 128, depth, 4, 2)
    return Tiles(block, 128, depth, 8, 2, _shared_by_two(query))


def _shared_by_two(query: Tensor) -> int | None:
    """The registers a thread of 8 warps may have for two programs to share a multiprocessor."""
    return 128 if common.is_hopper(query) else None


def gradient_tiles(query: Tensor, rows: int) -> Tiles:
    """For the backward kernels, which hold a tile of gradients beside the tile of logits."""
    depth, block = _power_of_2(query.shape[2], 128), _power_of_2(rows, 64)
    if query.dtype == torch.float32:
        return Tiles(min(block, 32), 32, min(depth, 32), 4, 2)
    if common.is_amd():
        return Tiles(min(block, 32), 32, depth, 4, 2)  # 64 by 64 spills
    # Two groups of four warps can't share 64 rows of wgmma: they would both compute all of them.
    return Tiles(block, 64, depth, 8 if block == 64 and not common.is_hopper(query) else 4, 2)


def _power_of_2(size: int, most: int) -> int:
    return max(16, min(triton.next_power_of_2(size), most))


@triton.jit
def row_heads(row, length, GROUP: tl.constexpr):
    """Token and head within the group of rows of a segment; rows behind the last one repeat it."""
    row = tl.minimum(row, length * GROUP - 1)
    return row % length, row // length


@triton.jit
def packed_start(first_row, segment, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """Where the rows of a segment start in the packed order."""
    return (first_row * GROUP // PACKED + segment) * PACKED


@triton.jit
def packed_block(
    cu_seqlens_q, rows, segments, packed_rows,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PACKED: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """What a program works on that takes BLOCK_ROWS packed rows of one key head: its segment with the first row and
    length of that, the key head, the rows counted within the segment, and where they lie in the packed order."""
    block = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    segment = segment_of_block(cu_seqlens_q, segments, block * BLOCK_ROWS // PACKED, PACKED, GROUP)
    first_row, length = segment_bounds(cu_seqlens_q, segment, rows)
    packed = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = packed - packed_start(first_row, segment, GROUP, PACKED)
    return segment, first_row, length, kv_head, row, packed + kv_head.to(tl.int64) * packed_rows


def packed_rows(query: Tensor, kv_heads: int, segments: int) -> int:
    """Rows of each key head in the packed order."""
    return common.blocks_of(query.shape[0] * (query.shape[1] // kv_heads), segments, PACKED) * PACKED


@triton.jit
def key_block(key, start, last, key_stride, MASKED: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """Keys from ``start`` on: the address of the first, their positions, and how far each is from it. Where MASKED,
    those behind the last repeat it."""
    offset = tl.arange(0, BLOCK_KEYS)
    position = start + offset
    if MASKED:
        offset = tl.minimum(position, last) - start
    return key + tl.cast(start, tl.int64) * key_stride, position, offset


@triton.jit
def load_tile(base, offsets, part, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr):
    """[len(offsets), DEPTH] of the rows at ``offsets``; zeros behind the head size."""
    depth = part * DEPTH + tl.arange(0, DEPTH)
    pointers = base + offsets[:, None] + depth[None, :]
    if HEAD_DIM % DEPTH == 0:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(depth < HEAD_DIM)[None, :], other=0)


@triton.jit
def copy_rows(source, from_rows, target, to_rows, there_are_any, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr):
    """The rows at ``from_rows`` to ``to_rows``; zeros where there are none."""
    for part in tl.static_range(0, (HEAD_DIM + DEPTH - 1) // DEPTH):
        depth = part * DEPTH + tl.arange(0, DEPTH)
        within = (depth < HEAD_DIM)[None, :]
        values = tl.load(source + from_rows[:, None] + depth[None, :], mask=within & there_are_any, other=0)
        tl.store(target + to_rows[:, None] + depth[None, :], values, mask=within)


@triton.jit
def stationary_tile(base, offsets, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr):
    """The tile that stays while another one streams past it: all of the head size, where that fits one tile."""
    if HEAD_DIM <= DEPTH:
        return load_tile(base, offsets, 0, HEAD_DIM, DEPTH)
    else:
        return tl.zeros([16, 16], base.dtype.element_ty)  # not read: product() loads both tiles part by part


@triton.jit
def product(
    stationary, base, offsets, other_base, other_offsets,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """fp32 [rows at offsets, rows at other_offsets]: their inner products over the head size."""
    if HEAD_DIM <= DEPTH:
        other = load_tile(other_base, other_offsets, 0, HEAD_DIM, DEPTH)
        return tl.dot(stationary, tl.trans(other), input_precision=PRECISION)
    else:
        sums = tl.zeros([offsets.shape[0], other_offsets.shape[0]], tl.float32)
        for part in range(0, (HEAD_DIM + DEPTH - 1) // DEPTH):
            tile = load_tile(base, offsets, part, HEAD_DIM, DEPTH)
            other = load_tile(other_base, other_offsets, part, HEAD_DIM, DEPTH)
            sums = tl.dot(tile, tl.trans(other), sums, input_precision=PRECISION)
        return sums


def precision(x: Tensor) -> str:
    """fp32 stays fp32; tensor-core products of 16-bit inputs are exact before they are added up in fp32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with its last axis contiguous; the other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@dataclass(frozen=True)
class Splits:
    """How the keys are shared out over programs that each keep their own partial result.

    ``chunk`` keys a program, ``blocks`` chunks in all, at most ``most`` of them in one segment; ``slots`` programs
    share the row tiles of a chunk and key head.
    """

    chunk: int
    blocks: int
    most: int
    slots: int


@cache
def chunks_of_a_full_card(programs: int, places: int, segments: int) -> int:
    """How many chunks, of ``programs`` each, to make for a card that runs ``places`` programs at once.

    The fewest that keep 95 places of 100 busy to the end: one chunk more would often run when all the others have
    finished. Several segments end in chunks of unequal length, which even out where there are many.
    """
    if segments > 1:
        return max(1, 4 * places // programs)

    def busy(chunks: int) -> float:
        return chunks * programs / (triton.cdiv(chunks * programs, places) * places)

    return max(range(1, 4 * places // programs + 4), key=lambda chunks: (min(busy(chunks), 0.95), -chunks))


def split_keys(
    query: Tensor, key: Tensor, segments: int, block: Tiles, *, bytes_a_row: int, budget: int = 64 << 20
) -> Splits:
    """Chunks enough to keep the card busy, while the partial results fit ``budget`` bytes.

    From host-known totals alone; segments of unequal length get chunks in proportion.
    """
    rows, heads, _ = query.shape
    keys, kv_heads = key.shape[:2]
    slots = max(1, triton.cdiv(triton.cdiv(rows, segments) * (heads // kv_heads), block.rows))
    wanted = chunks_of_a_full_card(slots * kv_heads, 2 * common.multiprocessors(query), segments)
    affordable = max(1, budget // max(1, heads * rows * bytes_a_row))
    chunk = triton.cdiv(max(1, triton.cdiv(keys, min(wanted, affordable))), block.keys) * block.keys
    return Splits(chunk, common.blocks_of(keys, segments, chunk), keys // chunk + 1, slots)
