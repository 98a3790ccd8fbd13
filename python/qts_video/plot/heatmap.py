"""Relevance over the frames, a row a layer, on one scale."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from qts_video.overlay import steps_shown

from .page import Page, Table
from .sheet import GAP, HEAT, LEFT, RIGHT, WIDTH, Sheet, bare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OPACITY = 0.6
SCALE = "relevance, as a multiple of the layer's mean (logarithmic)"
DECADES = 4
"""The scale spans at most this many: what lies below takes its lowest colour."""


def relative_scores(scores: Mapping[int, torch.Tensor], grid: tuple[int, int, int]) -> dict[int, np.ndarray]:
    """Of each layer, [T, H, W] float64: its scores [T*H*W] over their mean, so that layers share one scale.

    Raises:
        ValueError: scores of another length, one that is not finite or below 0, or all of a layer 0.
    """
    relative = {}
    for layer, values in sorted(scores.items()):
        if values.numel() != grid[0] * grid[1] * grid[2]:
            raise ValueError(f"layer {layer} has {values.numel()} scores, the grid {grid} takes {np.prod(grid)}")
        of_layer = values.double().cpu().numpy().reshape(grid)
        if not np.isfinite(of_layer).all() or of_layer.min() < 0 or of_layer.max() == 0:
            raise ValueError(f"layer {layer}: relevance must be finite, at least 0 and somewhere above it")
        relative[layer] = of_layer / of_layer.mean()
    return relative


def heatmap_page(
    frames: torch.Tensor,
    seconds: torch.Tensor,
    scores: Mapping[int, torch.Tensor],
    grid: tuple[int, int, int],
    *,
    title: str,
    subtitle: str = "",
    max_panels: int = 6,
) -> Page:
    """Relevance over frames as a page; its table has the largest relevance of every step of the grid and layer.

    Args:
        frames: [F, 3, H, W] in 0..255, the sampled frames; several share a step of the token grid.
        seconds: [T] time of each step.
        scores: of each layer, [T*H*W] relevance of every token.
        grid: (T, H, W), time steps, rows, columns.
        title, subtitle: plain text.
        max_panels: frames shown: of as many equal stretches of the video, the most relevant step.
    """
    relative = relative_scores(scores, grid)
    rows = [
        [f"{second:.1f} s", *(f"{of_layer[step].max():.3g}" for of_layer in relative.values())]
        for step, second in enumerate(seconds.tolist())
    ]
    largest = [f"layer {a} at {seconds[np.unravel_index(r.argmax(), grid)[0]]:.1f} s" for a, r in relative.items()]
    return Page(
        title,
        subtitle,
        lambda title, subtitle: draw_heatmap(
            frames, seconds, relative, title=title, subtitle=subtitle, max_panels=max_panels
        ),
        f"Frames with relevance as colour over them, a row a layer. Largest relevance: {', '.join(largest)}.",
        (
            Table(
                "Largest relevance at a time, as a multiple of the layer's mean",
                ["time", *(f"layer {layer}" for layer in relative)],
                rows,
            ),
        ),
    )


def draw_heatmap(
    frames: torch.Tensor,
    seconds: torch.Tensor,
    relative: Mapping[int, np.ndarray],
    *,
    title: str = "",
    subtitle: str = "",
    max_panels: int = 6,
) -> "Figure":
    """The frames as they are, then a row a layer with its relevance laid over them; one scale below all."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    steps = len(seconds)
    shown = steps_shown(steps, min(max_panels, steps), np.maximum.reduce(list(relative.values())))
    frames_per_step = -(-len(frames) // steps)
    pictures = [_picture(frames[min(step * frames_per_step, len(frames) - 1)]) for step in shown]
    tall, wide = pictures[0].shape[:2]
    width = min((WIDTH - LEFT - RIGHT - GAP * (len(shown) - 1)) / len(shown), 5 * wide / tall, 4.2)
    height = width * tall / wide

    most = max(of_layer.max() for of_layer in relative.values())
    least = min(of_layer[of_layer > 0].min() for of_layer in relative.values())
    least = min(max(least, most / 10**DECADES), most / 1.01)
    scale, colours = LogNorm(least, most, clip=True), colormaps[HEAT]

    rows = len(relative) + 1
    bar_top = rows * (height + GAP) + 0.3 + 0.4
    sheet = Sheet(bar_top + 0.85, title, subtitle)
    for place, (step, picture) in enumerate(zip(shown, pictures, strict=True)):
        left = LEFT + place * (width + GAP)
        axes = sheet.axes(left, 0.0, width, height)
        axes.imshow(picture, aspect="auto")
        bare(axes, "frame" if place == 0 else "")
        axes.set_xlabel(f"{seconds[step]:.1f} s", fontsize=10, labelpad=3)
        for row, (layer, of_layer) in enumerate(relative.items(), 1):
            top = row * (height + GAP) + 0.3
            axes = sheet.axes(left, top, width, height)
            axes.imshow(laid_over(picture, colours(scale(of_layer[step]))[..., :3]), aspect="auto")
            bare(axes, f"layer {layer}" if place == 0 else "")
        if len(relative) > 1:
            axes.set_xlabel(f"{seconds[step]:.1f} s", fontsize=10, labelpad=3)

    strip = OPACITY * colours(np.linspace(0, 1, 256))[:, :3] + (1 - OPACITY) * 0.5
    bar = sheet.axes(LEFT, bar_top, min(6.5, WIDTH - LEFT - RIGHT), 0.2)
    from matplotlib.cm import ScalarMappable

    mappable = ScalarMappable(scale, LinearSegmentedColormap.from_list("heat", strip))
    ticks = round_ticks(least, most)
    sheet.figure.colorbar(mappable, cax=bar, orientation="horizontal", label=SCALE, ticks=ticks)
    bar.set_xticks([], minor=True)
    bar.set_xticks(ticks, [f"{tick:.4g}×" for tick in ticks])
    return sheet.figure


def round_ticks(least: float, most: float, number: int = 6) -> list[float]:
    """At most ``number`` round values of [least, most], evenly spaced by ratio where that spans much, else by
    difference."""
    exponents = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if least <= tick <= most]
        if 3 <= len(ticks) <= number:
            return ticks
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(number - 1).tick_values(least, most)
    return [tick for tick in ticks.tolist() if least <= tick <= most]


def laid_over(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """[H, W, 3] in 0..1: colours [h, w, 3] laid translucently over a greyed picture, each over its block of it."""
    tall, wide = picture.shape[:2]
    row = np.arange(tall) * heat.shape[0] // tall
    column = np.arange(wide) * heat.shape[1] // wide
    grey = np.repeat(picture @ np.array([0.299, 0.587, 0.114])[:, None], 3, axis=2) / 255
    return OPACITY * heat[row][:, column] + (1 - OPACITY) * grey


def _picture(frame: torch.Tensor) -> np.ndarray:
    """[H, W, 3] uint8 of [3, H, W] in 0..255."""
    return frame.permute(1, 2, 0).float().clamp(0, 255).byte().cpu().numpy()
