"""What one turn of a kernel's inner loop takes of a Hopper multiprocessor, read off its machine code: no card needed.

A multiprocessor starts 4 instructions a clock, each for a warp of 32 threads; its tensor cores do 2,048
multiply-adds of 16-bit numbers a clock, its special-function units 16 exponentials. What a turn takes of each bounds
its time from below; a loop that multiplies should need its tensor cores for longer than it needs to issue.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

WARPS_A_CLOCK = 4
# HGMMA.64xNx16 by each group of 4 warps: 64 * N * 16 / 2,048 clocks.
CLOCKS_A_COLUMN = 64 * 16 / 2048
CLOCKS_A_SPECIAL = 32 / 16

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True)
class Loop:
    """One turn of a loop without branches into it: instructions a warp, and clocks of a program's warps together."""

    kernel: str
    instructions: int
    issue: float
    tensor: float
    special: float


def loops(compiled) -> Iterator[Loop]:
    """The innermost loops of a kernel that Triton compiled for sm_90, in the order of its code."""
    code = _disassembled(compiled.asm["cubin"])
    starts = {}
    found = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            starts[label[1]] = len(found)
        elif instruction := _INSTRUCTION.search(line):
            found.append((instruction[1], instruction[2]))
    ends = []
    for at, (name, operands) in enumerate(found):
        target = re.search(r"(\.L_x_\d+)", operands)
        if name.startswith("BRA") and target and starts.get(target[1], at + 1) < at:
            ends.append((starts[target[1]], at + 1))
    for first, end in ends:
        if any(first <= start and stop < end for start, stop in ends):
            continue  # not innermost
        names = [name for name, _ in found[first:end]]
        warps = compiled.metadata.num_warps
        columns = sum(int(m[1]) for name in names if (m := re.match(r"HGMMA\.64x(\d+)x16", name)))
        special = sum(name.startswith("MUFU") for name in names)
        yield Loop(
            compiled.name,
            len(names),
            len(names) * warps / WARPS_A_CLOCK,
            columns * CLOCKS_A_COLUMN * warps / 4,
            special * CLOCKS_A_SPECIAL * warps,
        )


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-c", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def table(rows: list[tuple[str, Loop]]) -> str:
    """Rows of "op, configuration" and a loop as Markdown."""
    lines = ["| op | configuration | kernel | instructions | issue | tensor cores | exponentials |"]
    lines.append("|---|---|---|---:|---:|---:|---:|")
    for name, loop in rows:
        op, config = name.split(", ", 1)
        kernel = loop.kernel.lstrip("_")
        clocks = f"{loop.issue:.0f} | {loop.tensor:.0f} | {loop.special:.0f}"
        lines.append(f"| {op} | {config} | {kernel} | {loop.instructions} | {clocks} |")
    return "\n".join(lines) + "\n"
