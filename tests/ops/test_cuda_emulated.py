"""The CUDA kernels of the re-encoder on the CPU: csrc's own sources on an emulator of blocks, barriers and shuffles.

They take the place of the CPU kernels in a process of their own, which then runs the re-encoder's tests. What only a
card can show, races between warps and its own arithmetic, this does not.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
RUN = """
import ctypes, sys
import pytest, torch
from qts_kernels import _native
assert _native.absent("_C") is None
torch.ops.load_library(sys.argv[1])
status = pytest.main(["-q", "-p", "no:cacheprovider", "--disable-warnings", *sys.argv[2:]])
launches = ctypes.CDLL(sys.argv[1]).emulated_launches
launches.restype = ctypes.c_int64
print("launches:", launches())
sys.exit(status)
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("cuda_emulator_build", HERE / "cuda_emulator" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reencoder_on_emulated_kernels(builder, tmp_path):
    from qts_kernels import _native

    if _native.absent("_C"):
        pytest.skip(_native.absent("_C"))
    library = builder.build(tmp_path)
    command = [sys.executable, "-c", RUN, library, HERE / "test_reencode.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(done.stdout.rsplit("launches:", 1)[1]) > 500


def test_a_launch_that_is_not_understood_is_refused(builder):
    with pytest.raises(ValueError, match="a launch"):
        builder.emulated("kernels[i]<<<grid, block>>>(x);")
