"""Times of the stages of a prefill, measured without synchronising."""

import time

import torch


class Stopwatch:
    """Adds up the seconds of named stages: CUDA events on a GPU, the wall clock elsewhere.

    CUDA events are read when ``seconds`` is called, which waits for them; starting and stopping never waits.
    """

    def __init__(self) -> None:
        self._open: dict[str, float | torch.cuda.Event] = {}
        self._spans: dict[str, list[tuple]] = {}

    def start(self, stage: str, device: torch.device) -> None:
        self._open[stage] = _now(device)

    def stop(self, stage: str, device: torch.device) -> None:
        self._spans.setdefault(stage, []).append((self._open.pop(stage), _now(device)))

    def seconds(self) -> dict[str, float]:
        """Seconds of every stage that was stopped."""
        return {stage: sum(_elapsed(*span) for span in spans) for stage, spans in self._spans.items()}


def _now(device: torch.device) -> "float | torch.cuda.Event":
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _elapsed(start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1e3
