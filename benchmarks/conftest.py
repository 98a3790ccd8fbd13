"""What every benchmark shares: the device, timing that is fair to a GPU, and a table of ratios at the end.

A benchmark is a row (op, shape, who). It checks its answer before it times it. Times are only ever compared within
one run; the table gives each peer's median over ours. The JSON under benchmarks/results/ holds the machine's and the
versions' names beside them, and is rendered as a table and a plot there; where it is of this machine, a run fails that
lost more than 15 % of a ratio in it. So does one in which an op is slower than its own eager reference.
"""

import platform
import re
import time
from pathlib import Path

import ceilings
import guard
import pytest
import report
import torch
import triton
from clock import GpuClock, captured
from report import EVERYTHING, OURS

RESULTS = Path(__file__).parent / "results"
SHORTEST_ROUND = 2e-4
"""Seconds of a CPU round: a shorter call is repeated in it, for a clock reading costs some tenths of a microsecond."""
EXTRAS = (
    *("op", "shape", "who", "tokens", "floor_s", "peak_mb"),
    *("flop_ratio", "selection_share", "vision_s", "prefill_s", "first_token_s"),
    *("kept", "decoupling_s", "scoring_s", "scorer_mb"),
)


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = (
        re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu_clock(request, device) -> GpuClock | None:
    """The timer of the ``benchmark`` fixture, which reads its marker: ask for it first. None on a CPU."""
    if device == "cpu":
        return None
    clock = GpuClock()
    request.node.add_marker(pytest.mark.benchmark(timer=clock))
    return clock


@pytest.fixture
def timed(gpu_clock, benchmark, device):
    """timed(op, shape, who, fn): time ``fn`` for about ``seconds`` and file it under (op, shape, who). Given ``calls``,
    as many of one that takes seconds and was run before.

    On a GPU: its own time behind a cleared L2, of a CUDA graph's replay where ``graph``. ``work`` is what the op can't
    avoid, by which the table says how near to the floor it came.
    """

    def run(
        op,
        shape,
        who,
        fn,
        *,
        graph: bool = True,
        seconds: float = 2.0,
        calls: int = 0,
        work: ceilings.Work | None = None,
    ):
        benchmark.group = f"{op} | {shape}"
        benchmark.name = who
        benchmark.extra_info.update(op=op, shape=shape, who=who)
        if work is not None:
            benchmark.extra_info["floor_s"] = work.floor(device)
        if not calls:
            fn()
        if gpu_clock is not None:
            fn = gpu_clock.timed(captured(fn) if graph else fn)
        if calls:
            benchmark.pedantic(fn, rounds=calls, iterations=1)
            return
        fn()
        once = _once(fn)
        iterations = 1 if gpu_clock is not None else max(1, int(SHORTEST_ROUND / once))
        rounds = max(5, min(50, int(seconds / (once * iterations)))) if once < 5 else 2
        benchmark.pedantic(fn, rounds=rounds, iterations=iterations, warmup_rounds=2 if once < 5 else 0)

    return run


def _once(fn) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def rows(benchmarks) -> list[dict]:
    """One dictionary a benchmark: op, shape, who, median and interquartile range in seconds, the median's ratio to
    ours or its speed-up over all tokens, and where it is known the floor and the stages in seconds, the peak memory in
    MB and the limit that the FLOPs set to a speed-up."""
    found = [
        {
            **{k: b.extra_info[k] for k in EXTRAS if k in b.extra_info},
            "median_s": b.stats.median,
            "iqr_s": b.stats.iqr,
        }
        for b in benchmarks
        if "op" in b.extra_info and not b.has_error
    ]
    ours, everything = (
        {(r["op"], r["shape"]): r["median_s"] for r in found if r["who"] == who} for who in (OURS, EVERYTHING)
    )
    for r in found:
        base, whole = (medians.get((r["op"], r["shape"])) for medians in (ours, everything))
        r["ratio_to_ours"] = round(r["median_s"] / base, 3) if base else None
        if whole and r["who"] != EVERYTHING:
            r["speedup"] = round(whole / r["median_s"], 3)
    return found


def pytest_addoption(parser):
    parser.addoption(
        "--record-results",
        action="store_true",
        help="write the ratios to benchmarks/results/ also where this machine has some there, which else are compared "
        f"with: a loss of more than {guard.ALLOWED:.0%} fails the run",
    )


def pytest_configure(config):
    # The table below says it shorter; --benchmark-verbose brings pytest-benchmark's own back.
    if hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True


def results_path() -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "-", machine()).strip("-").lower()
    return RESULTS / f"{name}.json"


def measured(config) -> list[dict]:
    session = getattr(config, "_benchmarksession", None)
    return [] if session is None else rows(session.benchmarks)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if exitstatus != pytest.ExitCode.OK:
        return
    found = measured(config)
    lost = [] if config.getoption("--record-results") else guard.lost(guard.read_rows(results_path()), found)
    if lost or guard.slower(found):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    found = measured(config)
    if not found:
        return
    write = terminalreporter.write_line
    write("")
    write(f"time relative to {OURS} (above 1: {OURS} is faster); {machine()}")
    for line in report.terminal_lines(found):
        write(line)
    for row in guard.slower(found):
        write(f"SLOWER  {guard.label(row)}: {row['ratio_to_ours']:.2f}x", red=True)
    path = results_path()
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    if path.exists() and not config.getoption("--record-results"):
        for row, before in guard.lost(guard.read_rows(path), found):
            write(f"LOST  {guard.label(row)}: {row['ratio_to_ours']:.2f}x, and {before:.2f}x in {shown}", red=True)
        write(f"compared with {shown} (--record-results writes it anew)")
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    rates = ceilings.measured("cuda" if torch.cuda.is_available() else "cpu")
    guard.write_rows(path, found, machine(), versions, rates)
    write(f"written to {shown}, {', '.join(of.name for of in report.render(path))}")
