"""What every benchmark shares: the device, timing that is fair to a GPU, and a table of ratios at the end.

A benchmark is a row (op, shape, who). It checks its answer before it times it. Times are only ever compared within
one run; the table gives each peer's median over ours. The JSON under benchmarks/results/ holds the machine's and the
versions' names beside them; where it is of this machine, a run fails that lost more than 15 % of a ratio in it.
"""

import platform
import re
from collections import defaultdict
from datetime import datetime, timezone
from pathlib import Path

import guard
import pytest
import torch
import triton

RESULTS = Path(__file__).parent / "results"
OURS = "qts_kernels"


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
def timed(benchmark, device):
    """timed(op, shape, who, fn): time ``fn`` and file it under (op, shape, who). On a GPU: CUDA-graph replays behind
    a cleared L2."""

    def run(op: str, shape: str, who: str, fn, *, graph: bool = True):
        benchmark.group = f"{op} | {shape}"
        benchmark.name = who
        benchmark.extra_info.update(op=op, shape=shape, who=who)
        fn()
        if device == "cpu":
            once = _once(fn)
            rounds = max(5, min(50, int(2.0 / max(once, 1e-4)))) if once < 5 else 2
            benchmark.pedantic(fn, rounds=rounds, iterations=1, warmup_rounds=2 if once < 5 else 0)
            return
        replay = _captured(fn) if graph else fn
        scrub = torch.empty(256 << 20, dtype=torch.int8, device=device)  # several times the L2 of any card so far

        def cold():
            replay()
            torch.cuda.synchronize()

        def clear():
            scrub.zero_()
            torch.cuda.synchronize()

        clear()
        rounds = max(3, min(50, int(2.0 / max(_once(cold), 1e-4))))
        benchmark.pedantic(cold, setup=clear, rounds=rounds, iterations=1, warmup_rounds=min(5, rounds))

    return run


def _once(fn) -> float:
    start = datetime.now(timezone.utc)
    fn()
    return (datetime.now(timezone.utc) - start).total_seconds()


def _captured(fn):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def rows(benchmarks) -> list[dict]:
    """One dictionary a benchmark: op, shape, who, median and interquartile range in seconds, the median's ratio to
    ours, and where it was measured the peak memory in MB and the limit that the FLOPs set to a speed-up."""
    found = [
        {
            **{
                k: b.extra_info[k]
                for k in ("op", "shape", "who", "peak_mb", "flop_ratio", "selection_share")
                if k in b.extra_info
            },
            "median_s": b.stats.median,
            "iqr_s": b.stats.iqr,
        }
        for b in benchmarks
        if "op" in b.extra_info and not b.has_error
    ]
    ours = {(r["op"], r["shape"]): r["median_s"] for r in found if r["who"] == OURS}
    for r in found:
        base = ours.get((r["op"], r["shape"]))
        r["ratio_to_ours"] = round(r["median_s"] / base, 3) if base else None
    return found


def pytest_addoption(parser):
    parser.addoption(
        "--record-results",
        action="store_true",
        help="write the ratios to benchmarks/results/ also where this machine has some there, which else are compared "
        f"with: a loss of more than {guard.ALLOWED:.0%} fails the run",
    )


def results_path() -> Path:
    name = re.sub(r"[^A-Za-z0-9]+", "-", machine()).strip("-").lower()
    return RESULTS / f"{name}.json"


def measured(config) -> list[dict]:
    session = getattr(config, "_benchmarksession", None)
    return [] if session is None else rows(session.benchmarks)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if config.getoption("--record-results") or exitstatus != pytest.ExitCode.OK:
        return
    if guard.lost(guard.read_rows(results_path()), measured(config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    found = measured(config)
    if not found:
        return
    table = defaultdict(list)
    for r in found:
        table[r["op"], r["shape"]].append(r)
    write = terminalreporter.write_line
    write("")
    write(f"time relative to {OURS} (above 1: {OURS} is faster); {machine()}")
    for (op, shape), group in table.items():
        write(f"{op}  {shape}")
        for r in sorted(group, key=lambda r: r["median_s"]):
            ratio = "" if r["ratio_to_ours"] is None else f"{r['ratio_to_ours']:8.2f}x"
            peak = "" if "peak_mb" not in r else f"   peak {r['peak_mb']} MB"
            peak += "" if "selection_share" not in r else f"   selection {r['selection_share']:.2%} of the prefill"
            write(f"    {r['who']:34s} {r['median_s'] * 1e3:10.3f} ms  +- {r['iqr_s'] * 1e3:7.3f} {ratio:>9}{peak}")
    path = results_path()
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    if path.exists() and not config.getoption("--record-results"):
        for row, before in guard.lost(guard.read_rows(path), found):
            of = f"{row['op']}  {row['shape']}  {row['who']}"
            write(f"LOST  {of}: {row['ratio_to_ours']:.2f}x, and {before:.2f}x in {shown}", red=True)
        write(f"compared with {shown} (--record-results writes it anew)")
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    guard.write_rows(path, found, machine(), versions)
    write(f"written to {shown}")
