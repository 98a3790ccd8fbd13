"""Installs without a compiler, and without CUDA: they work, and say what they lack."""

import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from builds import copy_checkout, run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]

USE = """
import warnings
import torch, qts_kernels
from qts_kernels import _native, backends

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    kept, _ = qts_kernels.topn(torch.tensor([0.5, 2.0, 1.0]), 2)
print(kept.tolist(), *[w.message for w in said if w.category is RuntimeWarning], sep="|")
print({r.implementation for r in backends.report() if r.device == "cpu" and r.op == "topn"})
print(_native.absent("_C_cuda"))
"""


def install(folder: Path, **environment: str) -> tuple[list[str], Path]:
    """Build with ``environment``: the compiled files of the wheel, and a folder with its packages."""
    source = copy_checkout(folder / "source")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=source, **environment)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", wheel, cwd=folder)
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")], folder / "site"


def test_without_a_compiler_it_runs_in_eager_pytorch_and_says_so(tmp_path):
    compiled, site = install(tmp_path, CXX="no-such-compiler")
    assert compiled == []
    kept, served, cuda = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert kept == (
        "[1, 2]|qts_kernels: _C was not built (it needs a C++ compiler when the package is installed); topn and others "
        "run slower in eager PyTorch"
    )
    assert served == "{'reference'}"
    assert "_C_cuda was not built (it needs a C++ compiler and nvcc" in cuda
    report = run(sys.executable, "-m", "qts_video", "doctor", cwd=tmp_path, PYTHONPATH=str(site))
    assert "compiled code for" in report
    assert "install a wheel, or build where there is a C++ compiler" in report


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="native code needs a C++ compiler")
def test_without_cuda_the_cpu_code_runs_and_the_rest_is_named(tmp_path):
    compiled, site = install(tmp_path, USE_CUDA="0")
    assert compiled == ["qts_kernels/_C.abi3.so"]
    kept, served, cuda = run(sys.executable, "-c", USE, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert (kept, served) == ("[1, 2]", "{'native'}")
    assert "_C_cuda was not built (it needs a C++ compiler and nvcc" in cuda
