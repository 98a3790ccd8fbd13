"""A figure laid out in inches from the top, in light or dark colours. Without pyplot: no window system, no global
figures."""

import contextlib
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Both hold against white and against the dark page, and are told apart with any colour vision.
KEPT, RELEVANCE = "#ff7f0e", "#3a87c8"
HEAT = "viridis"

WIDTH, LEFT, RIGHT, GAP = 15.0, 0.95, 0.3, 0.08  # inches
PAPER = {"light": "#ffffff", "dark": "#16181c"}
INK = {"light": "#111111", "dark": "#e6e6e6"}


@contextlib.contextmanager
def theme(name: str) -> Iterator[None]:
    """Figures made in this context are "light" or "dark"."""
    import matplotlib

    ink, paper = INK[name], PAPER[name]
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    with matplotlib.rc_context(dict.fromkeys(inked, ink) | {"figure.facecolor": paper, "axes.facecolor": paper}):
        yield


class Sheet:
    """A figure ``WIDTH`` inches wide with a title, if there is one, above ``height`` inches of content."""

    def __init__(self, height: float, title: str = "", subtitle: str = "") -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = textwrap.wrap(title, 110)[:2]
        small = [line for part in subtitle.splitlines() for line in textwrap.wrap(part, 165)]
        self._header = 0.22 + 0.3 * len(lines) + 0.24 * len(small) + (0.14 if lines else 0)
        self._height = self._header + height
        self.figure: Figure = Figure(figsize=(WIDTH, self._height), dpi=100)
        FigureCanvasAgg(self.figure)
        at = 1 - 0.18 / self._height
        self.figure.text(LEFT / WIDTH, at, "\n".join(lines), fontsize=15, weight="bold", va="top")
        at -= (0.3 * len(lines) + 0.06) / self._height
        self.figure.text(LEFT / WIDTH, at, "\n".join(small), fontsize=11, va="top", alpha=0.75)

    def axes(self, left: float, top: float, width: float, height: float, **options: object) -> "Axes":
        """Axes whose upper left corner is ``left`` inches from the left and ``top`` below the title."""
        bottom = 1 - (self._header + top + height) / self._height
        return self.figure.add_axes((left / WIDTH, bottom, width / WIDTH, height / self._height), **options)


def bare(axes: "Axes", label: str = "") -> None:
    """Nothing but the picture, and a label beside it."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_ylabel(label)
