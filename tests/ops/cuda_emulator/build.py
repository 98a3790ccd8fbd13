"""Builds the CUDA sources of csrc/ for the CPU, on the emulator beside this file."""

import re
import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
LAUNCH = re.compile(r"(\w+(?:<[^;{}()]*?>)?)<<<(.*?)>>>\(", re.DOTALL)
# What stands for a stream and a device that are not there, and where the operators go.
REPLACED = (
    (
        re.compile(r"struct Launch \{.*?\n\};", re.DOTALL),
        "struct Launch { Launch(const Tensor&) {} void* stream = nullptr; };",
    ),
    (re.compile(r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\)"), "(void)0"),
    (re.compile(r"is_cuda\(\)"), "is_cpu()"),
    (re.compile(r"(STABLE_TORCH_LIBRARY_IMPL\(qts_kernels_native), CUDA"), r"\1, CPU"),
)
COUNT = """#include <cuda_runtime.h>
extern "C" int64_t emulated_launches() { return emulator::launches; }
"""


def emulated(source: str) -> str:
    """CUDA C++ as the emulator runs it. Raises ValueError where a launch was not understood."""
    source = LAUNCH.sub(r"emulator::launch(\1, \2)(", source)
    for pattern, text in REPLACED:
        source = pattern.sub(text, source)
    if "<<<" in source:
        raise ValueError(f"a launch is written in a way that {LAUNCH.pattern} does not match")
    return source


def build(folder: Path) -> Path:
    """A library whose CPU operators are the CUDA kernels; ``emulated_launches()`` in it says how many ran."""
    written = []
    for path in [*CSRC.rglob("*.cu"), *CSRC.rglob("*.cuh"), *CSRC.rglob("*.inl")]:
        target = folder / path.relative_to(CSRC)
        target = target.with_name(target.name.replace(".cu", "_cu.cpp")) if path.suffix == ".cu" else target
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(emulated(path.read_text()))
        written += [target] if path.suffix == ".cu" else []
    count = folder / "count.cpp"
    count.write_text(COUNT)
    library = folder / "libemulated.so"
    includes = [f"-I{path}" for path in (HERE, folder, CSRC, *include_paths())]
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-w", "-ffp-contract=off"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command = ["g++", *flags, *includes, *written, count, "-o", library, *libraries, "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library
