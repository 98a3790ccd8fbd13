"""When the kept tokens are: tokens a second of video, and relevance, a row a selection."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .page import Page, Table
from .sheet import KEPT, LEFT, RELEVANCE, WIDTH, Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qts_video.dropin.report import VideoReport

MAX_BARS = 120
ROW, TITLE, BETWEEN = 1.5, 0.3, 0.22  # inches
RIGHT = 1.0  # room for the labels of relevance


@dataclass(frozen=True)
class Timeline:
    """One selection over time, in B bars of equal length."""

    name: str
    starts: np.ndarray
    """[B] seconds."""
    width: float
    """Seconds that a bar spans."""
    counts: np.ndarray
    """[B] kept tokens."""
    relevance: np.ndarray | None
    """[B] the largest of the bar; None: the method has no scores."""
    kept: int
    """Tokens of all bars, and newlines."""
    total: int
    """Tokens before selection, newlines among them."""

    @property
    def rates(self) -> np.ndarray:
        """[B] kept tokens a second of video."""
        return self.counts / self.width

    @property
    def heading(self) -> str:
        name = textwrap.shorten(self.name, 100, placeholder=" …")
        return f"{name}: {self.kept:,} of {self.total:,} video tokens ({self.kept / self.total:.1%})"


def timeline(name: str, report: "VideoReport") -> Timeline:
    """What ``report`` says of each moment. Where there are more than ``MAX_BARS`` steps of the token grid, a bar
    holds several; the last one may hold fewer."""
    steps, rows, columns = report.grid
    per_bar = math.ceil(steps / MAX_BARS)
    bars = math.ceil(steps / per_bar)
    seconds = report.frame_seconds.numpy()
    step = float(seconds[-1] - seconds[0]) / (steps - 1) if steps > 1 else 1.0
    relevance = None
    if report.scores is not None:
        of_step = report.scores.numpy().reshape(steps, rows * columns).max(axis=1)
        relevance = np.array([of_step[bar * per_bar : (bar + 1) * per_bar].max() for bar in range(bars)])
    return Timeline(
        name=name,
        starts=seconds[::per_bar],
        width=per_bar * step,
        counts=np.bincount(report.frame.numpy() // per_bar, minlength=bars),
        relevance=relevance,
        kept=report.kept,
        total=report.total,
    )


def timeline_page(timelines: Sequence[Timeline], *, title: str, subtitle: str = "") -> Page:
    """Selections over time as a page, one below the other; they are of one video."""
    header, columns = ["from"], [[f"{start:.1f} s" for start in timelines[0].starts]]
    for one in timelines:
        header.append(f"{one.name}: kept tokens")
        columns.append([str(count) for count in one.counts])
        if one.relevance is not None:
            header.append(f"{one.name}: largest relevance")
            columns.append([f"{value:.3g}" for value in one.relevance])
    peaks = [f"{one.heading}, most from {one.starts[one.counts.argmax()]:.1f} s on" for one in timelines]
    return Page(
        title,
        subtitle,
        lambda title, subtitle: draw_timeline(timelines, title=title, subtitle=subtitle),
        f"Bars of kept tokens over time, a row a selection. {'; '.join(peaks)}.",
        (Table(f"Every {timelines[0].width:.3g} s of the video", header, list(zip(*columns, strict=True))),),
    )


def draw_timeline(timelines: Sequence[Timeline], *, title: str = "", subtitle: str = "") -> "Figure":
    """Kept tokens a second of video as bars and relevance as a line, a row a selection, on one axis of time."""
    sheet = Sheet(len(timelines) * (TITLE + ROW + BETWEEN) + 0.55, title, subtitle)
    most = max(max(one.rates.max() for one in timelines), 1e-9)
    for place, one in enumerate(timelines):
        top = place * (TITLE + ROW + BETWEEN) + TITLE
        axes = sheet.axes(LEFT, top, WIDTH - LEFT - RIGHT, ROW)
        axes.bar(one.starts + one.width / 2, one.rates, width=0.86 * one.width, color=KEPT, alpha=0.8)
        axes.set_xlim(one.starts[0], one.starts[-1] + one.width)
        axes.set_ylim(0, 1.1 * most)
        axes.set_ylabel("kept tokens\na second")
        axes.set_title(one.heading, loc="left", fontsize=11, pad=6)
        axes.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(False)
        if one.relevance is not None:
            curve = axes.twinx()
            curve.plot(one.starts + one.width / 2, one.relevance, color=RELEVANCE, linewidth=2, marker=".")
            curve.set_ylim(0, 1.1 * max(one.relevance.max(), 1e-30))
            curve.set_ylabel("largest\nrelevance", color=RELEVANCE)
            curve.tick_params(axis="y", colors=RELEVANCE)
            curve.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
            curve.yaxis.get_offset_text().set_color(RELEVANCE)
            curve.spines[["top", "left", "bottom"]].set_visible(False)
            curve.spines["right"].set_color(RELEVANCE)
        if place < len(timelines) - 1:
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel("seconds of the video")
    return sheet.figure
