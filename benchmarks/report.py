"""Results for people: a short table on the terminal, and beside the JSON a rendered table and a plot.

``python benchmarks/report.py RESULTS.json`` renders again what a run has left.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OURS = "qts_kernels"
EVERYTHING = "all tokens"
"""Who: the model without selection, beside methods that are all ours."""

Row = dict[str, Any]


def grouped(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each (op, shape), the fastest first."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["op"], row["shape"]].append(row)
    return {of: sorted(group, key=lambda row: row["median_s"]) for of, group in groups.items()}


def notes(row: Row) -> Iterator[str]:
    """What a row knows besides its times."""
    if row.get("floor_s"):
        yield f"floor {row['floor_s'] / row['median_s']:.0%}"
    if row.get("speedup"):
        yield f"{row['speedup']:.2f}x as fast as {EVERYTHING}"
    if "first_token_s" in row:
        yield f"first token {row['first_token_s'] * 1e3:.0f} ms"
    if "vision_s" in row:
        yield f"vision tower {row['vision_s'] * 1e3:.0f} ms, prefill {row['prefill_s'] * 1e3:.0f} ms"
    if "scoring_s" in row:
        yield f"decoupling {row['decoupling_s'] * 1e3:.0f} ms, scoring {row['scoring_s'] * 1e3:.0f} ms"
    if "kept" in row:
        yield f"{row['kept']} tokens kept"
    if "peak_mb" in row:
        yield f"peak {row['peak_mb']} MB"
    if "scorer_mb" in row:
        yield f"besides the scorer's {row['scorer_mb']} MB"
    if "selection_share" in row:
        yield f"selection {row['selection_share']:.2%} of the prefill"


def ratio(row: Row) -> str:
    return "" if row["ratio_to_ours"] is None else f"{row['ratio_to_ours']:.2f}x"


def terminal_lines(rows: list[Row]) -> Iterator[str]:
    """A block for each (op, shape), a line for each who."""
    for (op, shape), group in grouped(rows).items():
        yield f"{op}  {shape}"
        for row in group:
            times = f"{row['median_s'] * 1e3:10.3f} ms  +- {row['iqr_s'] * 1e3:7.3f}"
            yield f"    {row['who']:34s} {times} {ratio(row):>9}   {', '.join(notes(row))}".rstrip()


def markdown(results: dict[str, Any]) -> str:
    """The whole file as tables, one an op."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    ceilings = results.get("ceilings")
    lines = [
        f"# {results['machine']}",
        "",
        f"Medians and interquartile ranges, {results['date']}; {versions}. Ratio: how many times as long it takes as "
        f"{OURS}, in the same run. Floor: the share of its time that moving the bytes or multiplying would take at "
        "the rates measured here.",
        "",
    ]
    if ceilings:
        lines += ["Measured: " + ", ".join(f"{name} {value}" for name, value in ceilings.items()) + ".", ""]
    by_op = defaultdict(list)
    for (op, shape), group in grouped(results["rows"]).items():
        by_op[op] += [(shape, row) for row in group]
    for op, of_op in by_op.items():
        lines += [f"## {op}", "", "| shape | who | ms | +- | ratio | |", "|---|---|---|---|---|---|"]
        for shape, row in of_op:
            cells = shape, row["who"], f"{row['median_s'] * 1e3:.3f}", f"{row['iqr_s'] * 1e3:.3f}", ratio(row)
            lines.append(f"| {' | '.join(cells)} | {', '.join(notes(row))} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """A line for every op and peer, a dot on it for every shape: how many times as long the peer takes, on a
    logarithmic scale; left of 1 it is faster."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = defaultdict(list)
    for row in sorted(results["rows"], key=lambda row: (row["op"], row["who"]), reverse=True):
        if row["ratio_to_ours"] and row["who"] != OURS:
            lines[f"{row['op']}: {row['who']}"].append(row["ratio_to_ours"])
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.17 * len(lines)), layout="constrained")
    for label, ratios in lines.items():
        axes.scatter(ratios, [label] * len(ratios), s=12, color=["#2a7" if r >= 1 else "#c54" for r in ratios])
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.set_title(f"Time of peers, in times of {OURS}, a dot a shape: {results['machine']}", fontsize=9)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def plot_growth(results: dict[str, Any], path: Path) -> None:
    """Time and peak memory by the number of tokens, where rows say it, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = defaultdict(list)
    for row in results["rows"]:
        if "tokens" in row:
            curves[row["op"], row["who"]].append(row)
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (op, who), of_curve in curves.items():
        of_curve.sort(key=lambda row: row["tokens"])
        x = [row["tokens"] for row in of_curve]
        times.plot(x, [row["median_s"] for row in of_curve], marker="o", label=f"{op}: {who}")
        memory.plot(x, [max(row["peak_mb"], 1) for row in of_curve], marker="o")
    for axes, label in ((times, "seconds"), (memory, "peak MB beside weights and tokens")):
        axes.set(xscale="log", yscale="log", xlabel="vision tokens", ylabel=label)
        axes.grid(alpha=0.3)
    times.legend(fontsize=8)
    figure.suptitle(results["machine"], fontsize=9)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def render(path: Path) -> list[Path]:
    """Write the table and the plots of a results file beside it."""
    results = json.loads(path.read_text())
    made = [path.with_suffix(".md"), path.with_suffix(".png")]
    made[0].write_text(markdown(results))
    plot(results, made[1])
    if any("tokens" in row for row in results["rows"]):
        made.append(path.with_name(f"{path.stem}-growth.png"))
        plot_growth(results, made[2])
    return made


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(*render(Path(name)))
