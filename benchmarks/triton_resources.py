"""Compile every Triton kernel for cards that need not be here; write registers, spills, shared memory and
what the inner loops take to a table.

    python benchmarks/triton_resources.py [--output benchmarks/results/triton-resources.md]

The launchers run on CPU tensors of a real shape while their launches are recorded instead of started, so what is
compiled is what they would launch, specialisation included.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from inner_loops import Loop, loops
from inner_loops import table as loop_table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from qts_kernels.ops import _triton_common
from qts_kernels.ops.allocate_tokens import triton as allocate_tokens
from qts_kernels.ops.gather_tokens import triton as gather_tokens
from qts_kernels.ops.merge_tokens import triton as merge_tokens
from qts_kernels.ops.relevance import triton as relevance
from qts_kernels.ops.resize_frames import triton as resize_frames
from qts_kernels.ops.rms_scale import triton as rms_scale
from qts_kernels.ops.soft_threshold import triton as soft_threshold
from qts_kernels.ops.topn import triton as topn

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory a program may take.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Launch:
    """A kernel and the arguments of one launch."""

    kernel: JITFunction
    arguments: tuple
    options: dict


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers a thread, spilled bytes (AMD: vector registers), bytes of shared memory."""

    op: str
    kernel: str
    config: str
    target: str
    warps: int
    registers: int
    spills: int
    shared: int


def cases() -> dict[str, Callable[[], object]]:
    """Calls of the launchers by "op, configuration", at the shapes of an H200's targets but fewer keys."""
    rows, keys, heads, kv_heads = 64, 4096, 28, 4
    cu_q = torch.tensor([0, rows], dtype=torch.int32)
    cu_k = torch.tensor([0, keys], dtype=torch.int32)
    scores = torch.zeros(keys)

    def scored(dtype, head_dim, reduce, causal, with_argrow, key_scale):
        q, k = torch.zeros(rows, heads, head_dim, dtype=dtype), torch.zeros(keys, kv_heads, head_dim, dtype=dtype)
        scale = torch.ones(keys) if key_scale else None
        return lambda: relevance.relevance(
            q, k, scale, cu_q, cu_k, None, None, keys, reduce, head_dim**-0.5, causal, with_argrow
        )

    def backward(dtype, head_dim, reduce):
        q, k = torch.zeros(rows, heads, head_dim, dtype=dtype), torch.zeros(keys, kv_heads, head_dim, dtype=dtype)
        lse, argrow = torch.zeros(heads, rows), torch.zeros(keys, dtype=torch.int64)
        return lambda: relevance.relevance_backward(
            scores, q, k, torch.ones(keys), cu_q, cu_k, None, None, scores, lse, argrow, reduce, 0.1, False
        )

    def resized(dtype, mode, backward=False):
        sizes, cu = torch.tensor([(8, 9), (8, 9)]), torch.tensor([0, 72, 144], dtype=torch.int32)
        if backward:
            grad = torch.zeros(144, 3584, dtype=dtype)
            return lambda: resize_frames.resize_frames_backward(grad, sizes, cu, 27, 27, mode)
        frames = torch.zeros(2, 27, 27, 3584, dtype=dtype)
        return lambda: resize_frames.resize_frames(frames, sizes, cu, 144, mode)

    def merged(dtype, compat):
        counts, cu = torch.tensor([100, 44]), torch.tensor([0, 100, 144], dtype=torch.int32)
        frames = torch.zeros(2, 729, 3584, dtype=dtype)
        return lambda: merge_tokens.merge_tokens(frames, counts, cu, None, 144, compat)

    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "relevance, bf16 128 max": scored(bf16, 128, "max", False, False, False),
        "relevance, bf16 128 max key_scale": scored(bf16, 128, "max", False, False, True),
        "relevance, bf16 128 max key_scale argrow": scored(bf16, 128, "max", False, True, True),
        "relevance, bf16 128 mean causal": scored(bf16, 128, "mean", True, False, False),
        "relevance, bf16 80 max": scored(bf16, 80, "max", False, False, False),
        "relevance, fp32 128 max key_scale": scored(fp32, 128, "max", False, False, True),
        "relevance_backward, bf16 128 max": backward(bf16, 128, "max"),
        "relevance_backward, bf16 128 mean": backward(bf16, 128, "mean"),
        "relevance_backward, fp32 128 max": backward(fp32, 128, "max"),
        "topn, fp32": lambda: topn.topn(scores, cu_k, torch.ones(1, dtype=torch.int64), 1024),
        "gather_rows, bf16 3584 + int64 3": lambda: gather_tokens.gather_rows(
            [torch.zeros(64, 3584, dtype=bf16), torch.zeros(64, 3, dtype=torch.int64)],
            torch.zeros(32, dtype=torch.int64),
        ),
        "rms_scale, bf16 3584": lambda: rms_scale.rms_scale(torch.zeros(64, 3584, dtype=bf16), 1e-6),
        "allocate_tokens, 160 frames, capped": lambda: allocate_tokens.allocate_tokens(
            torch.ones(160, dtype=torch.float64),
            torch.tensor([0, 160], dtype=torch.int32),
            torch.tensor([12544]),
            torch.full((160,), 729),
        ),
        "resize_frames, bf16 bilinear": resized(bf16, "bilinear"),
        "resize_frames, fp32 adaptive_avg": resized(fp32, "adaptive_avg"),
        "resize_frames, bf16 linspace": resized(bf16, "linspace"),
        "resize_frames_backward, bf16 bilinear": resized(bf16, "bilinear", True),
        "resize_frames_backward, fp32 adaptive_avg": resized(fp32, "adaptive_avg", True),
        "resize_frames_backward, bf16 linspace": resized(bf16, "linspace", True),
        "merge_tokens, bf16": merged(bf16, False),
        "merge_tokens, fp32 compat": merged(fp32, True),
        "soft_threshold, fp32": lambda: soft_threshold.soft_threshold(scores, torch.full((1,), 0.1), cu_k, 0.1),
    }


@contextmanager
def recorded(target: GPUTarget) -> Iterator[list[Launch]]:
    """Within the context launches are appended to the list instead of started, as they would be on ``target``."""
    launches: list[Launch] = []
    run, is_amd, is_hopper = JITFunction.run, _triton_common.is_amd, _triton_common.is_hopper

    def record(self, *arguments, grid, warmup, **options):
        launches.append(Launch(self, arguments, options))

    JITFunction.run, _triton_common.is_amd = record, lambda: target.backend == "hip"
    _triton_common.is_hopper = lambda x: target.arch == 90
    try:
        yield launches
    finally:
        JITFunction.run, _triton_common.is_amd, _triton_common.is_hopper = run, is_amd, is_hopper


def compiled(name: str, target_name: str) -> Iterator:
    """The kernels that one case launches, compiled: each once for each distinct set of constants."""
    target = TARGETS[target_name]
    with recorded(target) as launches:
        cases()[name]()
    backend = make_backend(target)
    seen = set()
    for launch in launches:
        bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
        bound, specialization, options = bind(*launch.arguments, **launch.options)
        options = {key: value for key, value in options.items() if key not in bound}
        parsed, signature, constants, attributes = launch.kernel._pack_args(
            backend, options, bound, specialization, options
        )
        kernel = triton.compile(
            ASTSource(launch.kernel, signature, constants, attributes), target=target, options=parsed.__dict__
        )
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            yield kernel


def compile_case(name: str, target_name: str) -> tuple[list[Resources], list[Loop]]:
    """What the kernels that one case launches take; and on sm_90 their inner loops that multiply."""
    op, config = name.split(", ", 1)
    resources, inner = [], []
    for kernel in compiled(name, target_name):
        usage = _usage(kernel, TARGETS[target_name])
        resources.append(Resources(op, kernel.name, config, target_name, kernel.metadata.num_warps, *usage))
        if target_name == "sm_90":
            inner += [loop for loop in loops(kernel) if loop.tensor]
    return resources, inner


def _usage(compiled, target: GPUTarget) -> tuple[int, int, int]:
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        read = {key: int(value) for key, value in re.findall(r"\.(\w+_count|group_segment_fixed_size):\s*(\d+)", text)}
        return read["vgpr_count"], read["vgpr_spill_count"], compiled.metadata.shared
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run(
            [tool, "-res-usage", cubin.name], check=True, capture_output=True, text=True, timeout=60
        ).stdout
    # ptxas reports spills as the stack and local memory of the kernel.
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK", "LOCAL"))
    return registers, stack + local, compiled.metadata.shared


def table(rows: list[Resources]) -> str:
    """The rows as Markdown."""
    head = "| op | configuration | kernel | target | warps | registers | spills | shared memory, KiB |"
    lines = [head, "|---|---|---|---|---:|---:|---:|---:|"]
    lines += [
        f"| {r.op} | {r.config} | {r.kernel.lstrip('_')} | {r.target} | {r.warps} | {r.registers} | {r.spills} "
        f"| {r.shared / 1024:.1f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parent / "results" / "triton-resources.md"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            pending = {
                (name, target): pool.submit(compile_case, name, target) for name in cases() for target in TARGETS
            }
            rows = [row for p in pending.values() for row in p.result()[0]]
            inner = [(name, loop) for (name, _), p in pending.items() for loop in p.result()[1]]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        f"# What each Triton kernel takes\n\nCompiled by Triton {triton.__version__} without a card, by "
        "`python benchmarks/triton_resources.py`. Registers are those of a thread (AMD: vector registers); spills are "
        "bytes of stack and local memory (AMD: spilled vector registers). Relevance has 28 query heads, 4 key heads "
        "and 64 question tokens.\n\n" + table(rows) + "\n## Inner loops that multiply on sm_90\n\nRead off the "
        "machine code by `benchmarks/inner_loops.py`: instructions of a warp, and clocks of a multiprocessor that one "
        "turn by all warps of a program takes to issue, of its tensor cores and of its special-function units. "
        "Bounds, not times. Of two loops the one with fewer instructions is the one that masks nothing.\n\n"
        + loop_table(inner)
    )
    sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
