"""Draws the metrics of one or more runs: a panel for each metric, a line for each run, the healthy range shaded.

    python -m study.plot out/ppo                                     # -> out/ppo/curves.svg
    python -m study.plot out/ppo out/grpo --out both.png --metrics score kl gold

A run is a folder that holds a metrics.jsonl. Any other folder stands for all runs below it. study/metrics.py has the
ranges, and says how to read each metric. For all stages of a run see study/report.py.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lib.cli import Flags, check, flag, run_main
from data.files import read_jsonl
from study.metrics import METRICS, Metric, bounded
from study.style import HEALTHY, HEALTHY_ALPHA, check_figure_name, line, save, style


@dataclass
class Config(Flags):
    runs: list[str] = flag([], "runs, or folders of runs", positional=True)
    out: str = flag("auto", "figure to write, .svg, .png or .pdf (auto: curves.svg in the first folder)")
    metrics: list[str] = flag([], "metrics to show, in this order (none: all that were logged)")


PANEL = (3.1, 2.1)  # inches, width and height
LEGEND = 0.25  # inches, height of a row of the legend


# -------------------------------------------------------------------------------- the logs


Curves = dict[str, dict[int, float]]  # {metric: {step: value}}


def find_runs(paths: list[str]) -> list[Path]:
    """The folders that hold a metrics.jsonl, among these and below them."""
    found = []
    for path in map(Path, paths):
        check(path.is_dir(), f"{path}: no such folder")
        below = [path] if (path / "metrics.jsonl").exists() else sorted(f.parent for f in path.rglob("metrics.jsonl"))
        check(bool(below), f"{path}: no metrics.jsonl in it or below it; a run writes one")
        found += below
    return list(dict.fromkeys(folder.resolve() for folder in found))


def read_curves(folder: Path) -> Curves:
    """The metrics of a run, where their values are finite numbers. (A nan is null in the log.)"""
    curves: Curves = {}
    for where, row in read_jsonl(folder / "metrics.jsonl"):
        check(is_number(row.get("step")), f'{where}: no "step" that is a number')
        for name, value in row.items():
            if name != "step" and is_number(value):
                curves.setdefault(name, {})[row["step"]] = float(value)
    check(bool(curves), f"{folder / 'metrics.jsonl'}: nothing was logged yet")
    return curves


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_runs(paths: list[str]) -> dict[str, Curves]:
    """The runs of these folders. The name of a run is its path in the deepest folder that holds them all."""
    folders = find_runs(paths)
    shared = os.path.commonpath([folder.parent for folder in folders])
    return {folder.relative_to(shared).as_posix(): read_curves(folder) for folder in folders}


def metrics_of(runs: dict[str, Curves]) -> list[str]:
    """All metrics that the runs log, in the order of METRICS, then the others."""
    logged = list(dict.fromkeys(name for curves in runs.values() for name in curves))
    return [name for name in METRICS if name in logged] + [name for name in logged if name not in METRICS]


# -------------------------------------------------------------------------------- the figure


def draw(runs: dict[str, Curves], metrics: list[str]) -> Figure:
    """A panel for each metric, and above them the legend of the runs."""
    columns = 2 if len(metrics) in (2, 4) else min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    height = PANEL[1] * rows + LEGEND * math.ceil((len(runs) + 1) / columns)
    figure = Figure(figsize=(columns * PANEL[0], height), layout="constrained")
    for number, name in enumerate(metrics, start=1):
        axes = figure.add_subplot(rows, columns, number)
        draw_panel(axes, name, runs)
        if number + columns > len(metrics):  # the lowest panel of its column
            axes.set_xlabel("step")
    handles = [Line2D([], [], **line(i), label=name) for i, name in enumerate(runs)]
    if any(bounded(METRICS[name]) for name in metrics if name in METRICS):
        handles.append(Patch(color=HEALTHY, alpha=HEALTHY_ALPHA, label="healthy at the end of a run"))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)
    return figure


def draw_panel(axes: Axes, name: str, runs: dict[str, Curves]) -> None:
    metric = METRICS.get(name, Metric(name))
    logged = [(i, curves[name]) for i, curves in enumerate(runs.values()) if name in curves]
    for i, curve in logged:
        axes.plot(curve.keys(), curve.values(), **line(i), marker="o" if len(curve) == 1 else None)
    axes.set_title(metric.title)
    axes.set_ylabel(metric.unit)
    axes.locator_params(axis="x", integer=True, nbins=5)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")  # no common factor or offset above the panel
    axes.set_ylim(*view([value for _, curve in logged for value in curve.values()], metric))
    if bounded(metric):
        axes.axhspan(metric.low, metric.high, color=HEALTHY, alpha=HEALTHY_ALPHA, linewidth=0)
        limits = f"{metric.low:g} to {metric.high:g}"
        axes.set_title(limits, loc="right", size=9, weight="normal", color=HEALTHY)


def view(values: list[float], metric: Metric) -> tuple[float, float]:
    """The part of the y axis that a panel shows: the data, and enough of the healthy range to see where they are in it.

    A third of the range's width is enough: all of it would press a KL of 1 flat under a limit of 15. If the data are
    outside the range, the nearer limit is in view."""
    lowest, highest = min(values), max(values)
    if bounded(metric):
        lowest, highest = min(lowest, metric.high), max(highest, metric.low)
        missing = max(0.0, (metric.high - metric.low) / 3 - (highest - lowest))
        if lowest + highest < metric.low + metric.high:  # widen the view towards the middle of the range
            highest += missing
        else:
            lowest -= missing
    margin = 0.06 * (highest - lowest) or 0.1 * abs(highest) or 1.0
    return lowest - margin, highest + margin


def plot_runs(paths: list[str], out: str | Path, metrics: list[str] | None = None) -> None:
    """Draw the metrics of some runs (None: all that they log) and write the figure. UserError names what is wrong."""
    check_figure_name(out)
    runs = read_runs(paths)
    logged = metrics_of(runs)
    for name in metrics or []:
        check(name in logged, f"--metrics {name}: not logged by these runs, which log {', '.join(logged)}")
    with style():
        figure = draw(runs, metrics or logged)
    save(figure, out)
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(metrics or logged)} metrics")


def run(config: Config) -> dict:
    out = Path(config.runs[0]) / "curves.svg" if config.out == "auto" else Path(config.out)
    plot_runs(config.runs, out, config.metrics)
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
