"""Write a picture: a PNG, or one HTML file that holds the picture, a dark one too, and the numbers."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .sheet import INK, PAPER, theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".html")


@dataclass(frozen=True)
class Table:
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The first cell of each names it."""


@dataclass(frozen=True)
class Page:
    """A picture and what it says in numbers."""

    title: str
    subtitle: str
    draw: Callable[[str, str], "Figure"]
    """Of a title and a subtitle, which may be empty."""
    alternative: str
    """What the picture shows, for those who can't see it."""
    tables: Sequence[Table] = field(default_factory=tuple)


def check_output(path: str | Path) -> Path:
    """Raise ValueError unless ``path`` is one that ``write`` can write."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"output {path}: expected a name that ends in {' or '.join(SUFFIXES)}")
    return path


def write(path: str | Path, page: Page) -> Path:
    """Write ``page`` as the suffix of ``path`` says, and make the folder it lies in.

    Raises:
        ValueError: another suffix than .png and .html.
    """
    path = check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
        path.write_bytes(_png(page, "light", page.title, page.subtitle))
    else:
        path.write_text(_html(page), encoding="utf-8")
    return path


def _png(page: Page, colours: str, title: str = "", subtitle: str = "") -> bytes:
    with theme(colours):
        buffer = io.BytesIO()
        page.draw(title, subtitle).savefig(buffer, format="png")
    return buffer.getvalue()


def _html(page: Page) -> str:
    light, dark = (base64.b64encode(_png(page, colours)).decode() for colours in ("light", "dark"))
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(page.title)}</title>
<style>
body {{ background: {PAPER["light"]}; color: {INK["light"]}; font: 16px/1.5 system-ui, sans-serif;
       max-width: 1500px; margin: 0 auto; padding: 1.5rem; }}
@media (prefers-color-scheme: dark) {{ body {{ background: {PAPER["dark"]}; color: {INK["dark"]}; }} }}
h1 {{ font-size: 1.4rem; margin: 0; }}
img {{ max-width: 100%; height: auto; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: bold; padding-bottom: .3rem; white-space: nowrap; }}
th, td {{ text-align: right; padding: .1rem .7rem; border-bottom: 1px solid #8884; white-space: nowrap; }}
th[scope=row] {{ text-align: left; }}
</style>
</head>
<body>
<h1>{html.escape(page.title)}</h1>
<p>{html.escape(page.subtitle).replace(chr(10), "<br>")}</p>
<picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">
<img alt="{html.escape(page.alternative)}" src="data:image/png;base64,{light}">
</picture>
{"".join(map(_table, page.tables))}</body>
</html>
"""


def _table(table: Table) -> str:
    header = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(name)}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in table.rows
    )
    return f"""\
<div class="table">
<table>
<caption>{html.escape(table.caption)}</caption>
<thead><tr>{header}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
"""
