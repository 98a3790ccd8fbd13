"""Loads the compiled extensions on first use, or records why one is absent.

``_C`` holds the CPU code and ``_C_cuda`` the CUDA code, so that a machine without CUDA loads the first alone. Both
are built on torch's stable ABI and register their kernels under ``qts_kernels_native::*``; neither is a Python
module.
"""

from functools import cache
from pathlib import Path

import torch

import qts_kernels._schemas  # noqa: F401  the schemas must exist before a library implements them


@cache
def absent(extension: str) -> str | None:
    """Load ``_C`` or ``_C_cuda``. None when it is loaded, else the reason why not, with the way to get it."""
    files = sorted(Path(__file__).parent.glob(f"{extension}.*so"))
    if not files:
        needs = "a C++ compiler and nvcc" if extension == "_C_cuda" else "a C++ compiler"
        return f"{extension} was not built (it needs {needs} when the package is installed)"
    if extension == "_C_cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    try:
        torch.ops.load_library(str(files[0]))
    except OSError as error:
        return f"{files[0].name} does not load with torch {torch.__version__}: {error}"
    return None
