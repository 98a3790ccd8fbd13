"""The CUDA code compiles for every card that the wheel serves, with no GPU here, and nothing spills."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")


@pytest.fixture(scope="module")
def resources():
    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "benchmarks" / "cuda_resources.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_report_is_read_as_ptxas_writes_it(resources):
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4sumsPKfPf' for 'sm_90'
ptxas info    : Function properties for _Z4sumsPKfPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 26 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem
ptxas info    : Compiling entry function '_Z4sumsPKfPf' for 'sm_100'
ptxas info    : Function properties for _Z4sumsPKfPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 0 barriers
"""
    first, second = resources.parse(report, "sums.cu")
    assert first == resources.Resources("sums.cu", "sums", "sm_90", 26, 36, 2048)
    assert second == resources.Resources("sums.cu", "sums", "sm_100", 7, 0, 0)


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("target", ["80", "90", "100"])
def test_every_kernel_compiles_without_spills(resources, target):
    kernels = resources.compile_all(NVCC, (target,), jobs=2)
    assert {k.source for k in kernels} == {s.name for s in resources.sources()}
    assert [k for k in kernels if k.spills] == []
    # Blocks of 512 threads fit a multiprocessor's 65,536 registers.
    assert max(k.registers for k in kernels) <= 128


def test_the_committed_table_names_every_source(resources):
    table = (ROOT / "benchmarks" / "results" / "cuda-resources.md").read_text()
    assert all(source.name in table for source in resources.sources())
