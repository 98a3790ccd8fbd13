"""What surrounds a timing: the GPU's clock, the floors, the rendered results."""

import json

import ceilings
import clock
import pytest
import report
import torch

ROWS = [
    {"op": "topn", "shape": "M=10", "who": "qts_kernels", "median_s": 1e-3, "iqr_s": 1e-5, "ratio_to_ours": 1.0},
    {"op": "topn", "shape": "M=10", "who": "eager", "median_s": 2e-3, "iqr_s": 1e-5, "ratio_to_ours": 2.0},
    {"op": "relevance", "shape": "M=9", "who": "bare GEMM", "median_s": 5e-4, "iqr_s": 0.0, "ratio_to_ours": None},
]


class FakeEvent:
    """A CUDA event of a card whose time is ``now``, in milliseconds."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


def test_the_gpu_clock_moves_by_what_events_measured_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(clock, "SCRUB_BYTES", 16)
    gpu = clock.GpuClock("cpu")

    def run():
        FakeEvent.now += 250

    run = gpu.timed(run)
    FakeEvent.now = 5000.0  # what passes outside of a call does not count
    run()
    assert gpu() == pytest.approx(0.25)
    FakeEvent.now += 9000
    run()
    assert gpu() == pytest.approx(0.5)


def test_a_floor_is_the_longer_of_moving_and_multiplying(monkeypatch):
    monkeypatch.setattr(ceilings, "copy_rate", lambda device: 100.0)
    monkeypatch.setattr(ceilings, "multiply_rate", lambda device, dtype: 1000.0 if dtype is torch.bfloat16 else 10.0)
    work = ceilings.Work(bytes=200, flops=500, dtype=torch.bfloat16)
    assert work.floor("cpu") == 2.0
    assert (work + ceilings.Work(flops=9500)).floor("cpu") == 10.0
    assert ceilings.Work(flops=500).floor("cpu") == 50.0
    assert ceilings.Work(bytes=50).floor("cpu") == 0.5


def test_measured_ceilings_are_rates():
    assert all(rate > 0 for rate in ceilings.measured("cpu").values())


def test_the_table_tells_ratio_floor_and_peak():
    rows = [{**ROWS[0], "floor_s": 25e-5, "peak_mb": 7}, *ROWS[1:]]
    block = "\n".join(report.terminal_lines(rows))
    assert block.index("qts_kernels") < block.index("eager")  # the fastest first
    for part in ("1.00x", "2.00x", "floor 25%", "peak 7 MB", "bare GEMM"):
        assert part in block


def test_a_results_file_is_rendered_as_a_table_and_a_plot(tmp_path):
    path = tmp_path / "card.json"
    results = {"machine": "A Card", "date": "2026-01-01", "versions": {"torch": "9"}, "ceilings": {"copy_tb_s": 4.3}}
    rows = [*ROWS, *({**ROWS[0], "shape": f"M={m}", "tokens": m, "peak_mb": m / 100} for m in (10, 1000))]
    path.write_text(json.dumps({**results, "rows": rows}))
    table, picture, growth = report.render(path)
    text = table.read_text()
    for part in ("# A Card", "torch 9", "copy_tb_s 4.3", "## topn", "| M=10 | eager | 2.000 | 0.010 | 2.00x |"):
        assert part in text
    assert all(of.read_bytes().startswith(b"\x89PNG") for of in (picture, growth))


def test_results_without_a_peer_render_too(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"machine": "m", "date": "d", "versions": {}, "rows": ROWS[:1]}))
    assert all(of.exists() for of in report.render(path))
