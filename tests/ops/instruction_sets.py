"""Runs a test file as a script in a process of its own, for one of the CPU's instruction sets."""

import os
import subprocess
import sys

import pytest


def run_with(isa: str, script: str) -> subprocess.CompletedProcess:
    """Run ``script`` where the C++ code was told to use ``isa``; it is chosen once, when the code is loaded."""
    environment = {**os.environ, "QTS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)


def check_sweep(isa: str, script: str) -> None:
    """Fail unless ``script`` passes with ``isa``; skip where this CPU lacks it."""
    done = run_with(isa, script)
    if "but this CPU has no more than" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
