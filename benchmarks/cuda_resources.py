"""Compile every CUDA kernel for cards that need not be here; write registers, spills and shared memory to a table.

python benchmarks/cuda_resources.py [--output benchmarks/results/cuda-resources.md]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[1]
TARGETS = ("80", "90", "100")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: registers a thread; spilled bytes, stack included; shared memory in bytes."""

    source: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int


def sources() -> list[Path]:
    """The CUDA sources of the project."""
    return sorted((ROOT / "csrc").rglob("*.cu"))


def compile_source(source: Path, target: str, nvcc: str) -> list[Resources]:
    """Compile one file for one target, with setup.py's options; RuntimeError with nvcc's words where that fails."""
    includes = [ROOT / "csrc", *cpp_extension.include_paths()]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, "-c", source, "-o", Path(folder) / "out.o", "-O3", "-std=c++17", "-Xptxas=-v"]
        command += ["-Xcompiler=-fPIC,-Wall", "-Werror=all-warnings", "-DUSE_CUDA"]
        command += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-gencode=arch=compute_{target},code=sm_{target}", *(f"-isystem={path}" for path in includes[1:])]
        command += [f"-I{includes[0]}"]
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc could not compile {source.name} for sm_{target}:\n{done.stderr[-4000:]}")
    return parse(done.stderr, source.name)


def parse(report: str, source: str) -> list[Resources]:
    """The kernels of one ``ptxas -v`` report."""
    entry = re.compile(
        r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<target>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found = []
    for match in entry.finditer(report):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spills = sum(int(match[key]) for key in ("stack", "stores", "loads"))
        target = f"sm_{match['target']}"
        shared_bytes = int(shared[1]) if shared else 0
        found.append(Resources(source, readable(match["name"]), target, int(match["registers"]), spills, shared_bytes))
    return found


def readable(symbol: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout.strip()
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("qts::cuda::", "")
    return re.sub(r"\(int\)|\(.*\)$", "", name).replace("__nv_bfloat16", "bf16").replace("__half", "fp16")


def compile_all(nvcc: str, targets: tuple[str, ...] = TARGETS, jobs: int | None = None) -> list[Resources]:
    """Every source for every target."""
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        pending = [pool.submit(compile_source, s, t, nvcc) for s in sources() for t in targets]
        return [kernel for p in pending for kernel in p.result()]


def table(rows: list[Resources]) -> str:
    """The rows as Markdown."""
    head = "| source | kernel | target | registers | spills, bytes | shared memory, bytes |"
    lines = [head, "|---|---|---|---:|---:|---:|"]
    lines += [f"| {r.source} | {r.kernel} | {r.target} | {r.registers} | {r.spills} | {r.shared} |" for r in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cuda-resources.md")
    options = parser.parse_args()
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("nvcc is not on the PATH")
    version = re.search(r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    rows = compile_all(nvcc)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(
        f"# What each CUDA kernel takes\n\nCompiled by nvcc {version[1]} against torch {torch.__version__} without a "
        "card, by `python benchmarks/cuda_resources.py`. The number in a name is the elements of one load; 1 serves "
        "rows that are not whole 16-byte packs.\n\n" + table(rows)
    )
    sys.stdout.write(table(rows))


if __name__ == "__main__":
    main()
