"""``make gpu`` on a machine that pretends: which commands it runs, and what becomes of their failures."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"
PYTHON = """#!/bin/bash
[ "$1" = - ] && exit 0
[ "$1" = -c ] && { echo 9.0; exit 0; }
[ "$2" = pip ] && exit 0
echo "python3 $* arch=$TORCH_CUDA_ARCH_LIST" >> "$CALLS"
[[ "$*" == *"$FAILS"* ]] && exit 3
exit 0
"""
SANITIZER = """#!/bin/bash
echo "sanitizer $* caching=$PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$CALLS"
[[ "$*" == *"$FAILS"* ]] && exit 9
exit 0
"""
COMMANDS = {"python3": PYTHON, "nvidia-smi": "#!/bin/bash\necho A Card\n", "compute-sanitizer": SANITIZER}


@pytest.fixture
def gpu(tmp_path):
    """gpu(*steps, fails=, without=): (exit status, output, calls)."""

    def run(*steps: str, fails: str = "nothing", without: str | None = None) -> tuple[int, str, list[str]]:
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir()
        for name, text in COMMANDS.items():
            if name != without:
                (folder / name).write_text(text)
                (folder / name).chmod(0o755)
        environment = {
            "PATH": f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "OUT": str(tmp_path / "out"),
            "CALLS": str(calls),
            "FAILS": fails,
        }
        done = subprocess.run(["bash", SCRIPT, *steps], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_all_steps_run_in_order(gpu):
    status, output, calls = gpu()
    assert status == 0, output
    assert "setup.py" in calls[0]
    assert "arch=9.0" in calls[0]  # for this card alone
    assert "pytest tests/ops tests/nn" in calls[1]
    for tool, call in zip(("memcheck", "racecheck", "initcheck"), calls[2:5], strict=True):
        assert f"--tool {tool}" in call
        assert call.endswith("benchmarks/every_kernel.py caching=1")
    assert "pytest benchmarks --ignore benchmarks/test_end_to_end.py --benchmark-only --record-results" in calls[5]
    models = "Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "LLaVA-Video-7B", "InternVL3-8B"
    for model, call in zip(models, calls[6:], strict=True):
        assert f"test_end_to_end.py -k {model} --benchmark-only --record-results" in call
    assert output.count("passed") == len(calls)


def test_a_failure_is_said_and_the_rest_still_runs(gpu):
    status, output, calls = gpu("sanitize", fails="racecheck")
    assert status == 9
    assert "racecheck: FAILED with 9" in output
    assert len(calls) == 3


def test_steps_are_chosen_by_name(gpu):
    status, _, calls = gpu("build", "tests")
    assert (status, len(calls)) == (0, 2)


def test_tuning_is_done_where_it_is_asked_for(gpu):
    _, _, calls = gpu("tune")
    assert [call.split()[1] for call in calls] == ["benchmarks/tune.py"]


def test_an_unknown_step_is_refused(gpu):
    status, output, calls = gpu("bild")
    assert (status, calls) == (2, [])
    assert "no step bild: build tests sanitize benchmarks models tune" in output


def test_without_the_sanitizer_the_run_fails_and_says_so(gpu):
    status, output, calls = gpu("sanitize", without="compute-sanitizer")
    assert (status, calls) == (1, [])
    assert "memory and races were not checked" in output
