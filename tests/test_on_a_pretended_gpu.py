"""The tests for a GPU on one that tests/pretended_gpu makes of the CPU. It takes the place of parts of torch, so each
group runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TESTS = Path(__file__).parent
GROUPS = {
    "pretence": ["pretended_gpu/check_pretence.py"],
    "drop-ins": ["video/dropin/test_on_a_gpu.py"],
    "modules": ["nn"],
    # Of the ops, what their own tests of the reference, the interpreter and the compiler leave open.
    "ops": ["ops", "-k", "never or capture or keeps_its_share or serves or neither or padding or outside or refuse"],
}


@pytest.mark.parametrize("group", GROUPS)
def test_on_a_pretended_gpu(group):
    paths = [TESTS / x if (TESTS / x).exists() else x for x in GROUPS[group]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretended_gpu.plugin", "-p", "no:cacheprovider"]
    marked = [] if group == "pretence" else ["-m", "gpu"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command += ["-W", "ignore::RuntimeWarning", *marked, *paths]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


def test_what_is_run_once_for_the_sanitizer():
    """A row of compute-sanitizer is not to be lost to a tensor on the wrong device."""
    command = [sys.executable, "-c", "import pretended_gpu.plugin, every_kernel; every_kernel.run('cuda')"]
    folders = [TESTS, TESTS.parent / "benchmarks", *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "reencoder bfloat16" in run.stdout
