"""A picture of a selection: kept tokens drawn over the frames, relevance maps, and both over time."""

import math
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

    from .dropin.report import VideoReport

KEPT, RELEVANCE = "#ff7f0e", "#1f5f99"
WIDTH, LEFT, RIGHT, GAP = 15.0, 0.95, 0.3, 0.08  # inches


def draw_selection(
    path: str | Path,
    frames: "torch.Tensor",
    report: "VideoReport",
    *,
    title: str,
    subtitle: str = "",
    max_panels: int = 6,
) -> Path:
    """Write a PNG: frames with what was kept in full light, their relevance maps, and both over time.

    Args:
        frames: [F, 3, H, W] in 0..255, the sampled frames; several frames share a step of the token grid.
        report: of this video, from ``handle.last.videos``.
        title, subtitle: plain text; the title is wrapped.
        max_panels: frames shown: of as many equal stretches of the video, the most relevant step of each; without
            relevance, steps that are spread evenly.
    """
    # Not pyplot: no global state, no window system, nothing in the way of the user's own figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, rows, columns = report.grid
    frames_per_step = math.ceil(len(frames) / steps)
    kept = np.zeros((steps, rows, columns), bool)
    kept.reshape(-1)[report.indices.numpy()] = True
    scores = None if report.scores is None else report.scores.numpy().reshape(steps, rows, columns)
    shown = steps_shown(steps, min(max_panels, steps), scores)

    panel_width = (WIDTH - LEFT - RIGHT - GAP * (len(shown) - 1)) / len(shown)
    panel_width = min(panel_width, 5 * frames.shape[-1] / frames.shape[-2])
    panel_height = panel_width * frames.shape[-2] / frames.shape[-1]
    lines = textwrap.wrap(title, 110)[:2]
    # (height, space below) of each band, in inches
    header = 0.5 + 0.3 * len(lines) + (0.3 if subtitle else 0)
    bands = [(panel_height, GAP)] + ([(panel_height, 0.3), (1.4, 0.12)] if scores is not None else [(0, 0.2)])
    height = header + sum(map(sum, bands)) + 1.4 + 0.6
    figure = Figure(figsize=(WIDTH, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)

    def axes_at(left: float, top: float, width: float, tall: float, **options: object) -> "Axes":
        return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height), **options)

    figure.text(LEFT / WIDTH, 1 - 0.14 / height, "\n".join(lines), fontsize=15, weight="bold", va="top")
    figure.text(LEFT / WIDTH, 1 - (header - 0.58) / height, subtitle, fontsize=11, color="#444444", va="top")

    top = header
    for place, step in enumerate(shown):
        frame = frames[min(step * frames_per_step, len(frames) - 1)].permute(1, 2, 0).float()
        axes = axes_at(LEFT + place * (panel_width + GAP), top, panel_width, panel_height)
        lit = _light(frame.clamp(0, 255).byte().numpy(), kept[step])
        axes.imshow(lit, extent=(0, columns, rows, 0), aspect="auto")
        _outline(axes, kept[step])
        _bare(axes, "kept tokens" if place == 0 else "")
        axes.set_title(
            f"{report.frame_seconds[step]:.1f} s   {kept[step].sum()} of {rows * columns}", fontsize=10, pad=4
        )
    top += panel_height + GAP
    chart_width = WIDTH - LEFT - RIGHT
    if scores is not None:
        limits = {"vmin": float(np.nanmin(scores)), "vmax": float(np.nanmax(scores))}
        for place, step in enumerate(shown):
            axes = axes_at(LEFT + place * (panel_width + GAP), top, panel_width, panel_height)
            axes.imshow(scores[step], extent=(0, columns, rows, 0), aspect="auto", cmap="magma", **limits)
            _bare(axes, "relevance" if place == 0 else "")
        top += panel_height + 0.3
        _draw_relevance(axes_at(LEFT, top, chart_width, 1.4), report, scores, shown)
        top += 1.4
    _draw_counts(axes_at(LEFT, top + 0.12, chart_width, 1.4), report, kept, shown)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path


def steps_shown(steps: int, panels: int, scores: np.ndarray | None) -> np.ndarray:
    """[panels] int: of as many equal stretches of the video, the most relevant step; without ``scores`` [steps, ...],
    steps that are spread evenly."""
    if scores is None:
        return np.linspace(0, steps - 1, panels).round().astype(int)
    best = np.nan_to_num(scores, nan=-np.inf).reshape(steps, -1).max(axis=1)
    starts = np.arange(panels + 1) * steps // panels
    return np.array([start + best[start:stop].argmax() for start, stop in pairwise(starts)])


def _light(frame: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """[H, W, 3]: kept tokens as they are, the rest behind a grey haze, which shows on dark and bright films alike."""
    height, width = frame.shape[:2]
    row = np.arange(height) * kept.shape[0] // height
    column = np.arange(width) * kept.shape[1] // width
    haze = 0.35 * (0.25 * frame + 0.75 * frame.mean(axis=2, keepdims=True)) + 62
    return np.where(kept[row][:, column][..., None], frame, haze.astype(np.uint8))


def _outline(axes: "Axes", kept: np.ndarray) -> None:
    """A line wherever a kept token borders on one that is not."""
    from matplotlib.collections import LineCollection

    padded = np.pad(kept, 1)
    below = [[(x - 1, y), (x, y)] for y, x in np.argwhere(padded[1:] != padded[:-1])]
    beside = [[(x, y - 1), (x, y)] for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1])]
    axes.add_collection(LineCollection(below + beside, colors=KEPT, linewidths=1.2))


def _draw_relevance(axes: "Axes", report: "VideoReport", scores: np.ndarray, shown: np.ndarray) -> None:
    middle = _time_axis(axes, report)
    flat = scores.reshape(len(middle), -1)
    axes.fill_between(middle, flat.max(axis=1), color=RELEVANCE, alpha=0.15, linewidth=0)
    axes.plot(middle, flat.max(axis=1), color=RELEVANCE, linewidth=2, label="largest of the step")
    axes.plot(middle, flat.mean(axis=1), color=RELEVANCE, linewidth=1.2, linestyle="--", label="mean")
    axes.set_ylabel("relevance")
    axes.set_ylim(bottom=0)
    for at in shown:
        axes.axvline(middle[at], color="black", linewidth=0.6, alpha=0.35)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.tick_params(labelbottom=False)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.97), fontsize=9, frameon=False, ncols=2)


def _draw_counts(axes: "Axes", report: "VideoReport", kept: np.ndarray, shown: np.ndarray) -> None:
    middle = _time_axis(axes, report)
    counts = kept.sum(axis=(1, 2))
    axes.bar(middle, counts, width=0.86 * _step(report), color=KEPT, alpha=0.75)
    axes.plot(middle[shown], np.zeros(len(shown)), "k^", markersize=7, clip_on=False, zorder=5)
    axes.set_ylabel("kept tokens")
    axes.set_xlabel("seconds  (▲ the frames above)")
    axes.set_ylim(0, 1.1 * max(1, counts.max()))


def _time_axis(axes: "Axes", report: "VideoReport") -> np.ndarray:
    """Prepare the axis of seconds; the middle of each step of the token grid."""
    seconds, step = report.frame_seconds.numpy(), _step(report)
    axes.set_xlim(seconds[0], seconds[-1] + step)
    axes.spines[["top", "right"]].set_visible(False)
    return seconds + step / 2


def _step(report: "VideoReport") -> float:
    """Seconds that one step of the token grid spans."""
    seconds = report.frame_seconds
    return float(seconds[-1] - seconds[0]) / (len(seconds) - 1) if len(seconds) > 1 else 1.0


def _bare(axes: "Axes", label: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label)
