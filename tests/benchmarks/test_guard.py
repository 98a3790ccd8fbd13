"""The guard of the benchmarks: what a run lost against the ratios on disk, and when that fails the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import guard
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def row(who="eager", ratio=2.0, op="topn", shape="M=10"):
    return {"op": op, "shape": shape, "who": who, "ratio_to_ours": ratio}


def test_a_ratio_that_fell_by_more_than_allowed_is_lost():
    stored = [row(ratio=2.0), row("other peer", 4.0), row("qts_kernels", 1.0)]
    now = [row(ratio=1.69), row("other peer", 3.41), row("qts_kernels", 1.0)]
    assert guard.lost(stored, now) == [(now[0], 2.0)]


def test_what_grew_is_new_or_has_no_ratio_is_not_lost():
    stored = [row(ratio=2.0), row("gone", 5.0), row("never compared", None)]
    now = [row(ratio=9.0), row("new", 0.1), row("never compared", 0.1), row(shape="M=20", ratio=0.1)]
    assert guard.lost(stored, now) == []
    assert guard.lost([], now) == []
    assert guard.lost(stored, [row(ratio=None)]) == []


def test_rows_replace_the_same_measurements_and_keep_the_others(tmp_path):
    path = tmp_path / "results" / "card.json"
    guard.write_rows(path, [row(ratio=2.0), row("other", 3.0)], "card", {"torch": "1"})
    guard.write_rows(path, [row(ratio=4.0)], "card", {"torch": "2"})
    results = json.loads(path.read_text())
    assert {r["who"]: r["ratio_to_ours"] for r in results["rows"]} == {"eager": 4.0, "other": 3.0}
    assert (results["machine"], results["versions"]) == ("card", {"torch": "2"})
    assert guard.read_rows(tmp_path / "absent.json") == []


def test_only_an_eager_reference_that_is_faster_is_slower_for_us():
    rows = [row(guard.REFERENCE, 0.84), row(guard.REFERENCE, 0.86), row("a line of PyTorch", 0.1)]
    assert guard.slower([*rows, row(guard.REFERENCE, None)]) == rows[:1]


BENCHMARK = """
import time
import pytest

@pytest.mark.parametrize("who", ["qts_kernels", "peer"])
def test_one(timed, who):
    timed("sleep", "short", who, lambda: time.sleep(0.02 if who == "peer" else 0.01))
"""


@pytest.fixture
def run(tmp_path):
    """run(*options): a benchmark of 2x in a folder of its own; (exit status, output)."""
    for name in ("conftest.py", "guard.py", "report.py", "clock.py", "ceilings.py"):
        (tmp_path / name).write_text((BENCHMARKS / name).read_text())
    (tmp_path / "test_sleep.py").write_text(BENCHMARK)

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-q", "--benchmark-only", "-p", "no:cacheprovider", *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return run


def test_a_run_is_recorded_then_compared_and_fails_on_a_loss(run, tmp_path):
    status, output = run()
    (path,) = (tmp_path / "results").glob("*.json")
    assert (status, "written to results" in output) == (0, True), output

    results = json.loads(path.read_text())
    for of in results["rows"]:
        if of["who"] == "peer":
            of["ratio_to_ours"] = 50.0
    path.write_text(json.dumps(results))
    status, output = run()
    assert (status, "LOST  sleep  short  peer" in output) == (1, True), output
    assert json.loads(path.read_text()) == results

    status, output = run("--record-results")
    assert (status, "LOST" in output) == (0, False), output
    ratios = {of["who"]: of["ratio_to_ours"] for of in json.loads(path.read_text())["rows"]}
    assert 1 < ratios["peer"] < 10
