"""Builds the two extensions on torch's stable ABI: one wheel for any Python >= 3.10 and any torch >= 2.10.

``_C`` is the CPU code, ``_C_cuda`` the CUDA code. CUDA is built when torch was built with it and nvcc is found, never
because a GPU is visible; ``USE_CUDA=0`` leaves it out, ``USE_NATIVE=0`` all compiled code, ``TORCH_CUDA_ARCH_LIST``
chooses the cards. Without a compiler the package installs all the same and runs in eager PyTorch, which ``qts doctor``
and the first op called will say.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from setuptools import find_packages, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
# 2.10 is the first torch whose stable ABI has what csrc/ uses. Python's own ABI does not matter: csrc/ never calls it.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
HOST = ["-O3", "-std=c++17", "-fvisibility=hidden", *DEFINES]


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob(pattern))


def cuda_home() -> str | None:
    """The CUDA toolkit that nvcc really belongs to (the nvcc on PATH may be a link)."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        nvcc and str(Path(nvcc).resolve().parents[1]),
        cpp_extension.CUDA_HOME,
        "/usr/local/cuda",
    ]
    for home in filter(None, candidates):
        if (Path(home) / "include" / "cuda_runtime.h").exists() and (Path(home) / "bin" / "nvcc").exists():
            return home
    return None


def extensions() -> list:
    found = []
    if os.environ.get("USE_NATIVE") == "0":
        print("qts_kernels: building without native code, as USE_NATIVE=0 asks", file=sys.stderr)
        return found
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        print("qts_kernels: no C++ compiler: building without native code", file=sys.stderr)
        return found
    found.append(
        cpp_extension.CppExtension(
            "qts_kernels._C",
            sources("**/*.cpp"),
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={"cxx": HOST},
            py_limited_api=True,
        )
    )
    home = cuda_home()
    cuda_sources = sources("**/*.cu")
    if os.environ.get("USE_CUDA") == "0" or not torch.version.cuda or home is None or not cuda_sources:
        print("qts_kernels: building without CUDA code", file=sys.stderr)
        return found
    cpp_extension.CUDA_HOME = home
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;8.6;8.9;9.0;10.0;12.0")
    found.append(
        cpp_extension.CUDAExtension(
            "qts_kernels._C_cuda",
            cuda_sources,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args={
                "cxx": HOST,
                "nvcc": [
                    "-O3",
                    "-std=c++17",
                    "-Xcompiler=-fvisibility=hidden",
                    *DEFINES,
                    "-DUSE_CUDA",
                ],
            },
            py_limited_api=True,
        )
    )
    return found


setup(
    packages=[
        *find_packages(".", include=["qts_kernels", "qts_kernels.*"]),
        *find_packages("python", include=["qts_video", "qts_video.*"]),
    ],
    package_dir={"qts_kernels": "qts_kernels", "qts_video": "python/qts_video"},
    ext_modules=extensions(),
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
