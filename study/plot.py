"""Draws the metrics of one or more runs, a panel for each, with its healthy range shaded.

    python -m study.plot out/ppo                                     # -> out/ppo/curves.svg
    python -m study.plot out                                         # all stages in out, a section for each kind
    python -m study.plot out/ppo out/grpo --out both.png --metrics score kl gold

A run is a folder that holds a metrics.jsonl; of any other folder all runs below it are drawn. Runs of one kind (SFT,
reward model, reinforcement learning, DPO) share a section. study/metrics.py has the ranges, and says how to read each
metric.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
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
TITLE, LEGEND = 0.4, 0.25  # inches, the height of a section's title and of each row of its legend

# {metric: kind}. A run is of the first kind whose metric it logs.
KINDS = {"score": "Reinforcement learning", "margin": "DPO", "accuracy": "Reward model", "loss": "SFT"}
SECTIONS = ("SFT", "Reward model", "Reinforcement learning", "DPO", "Other")  # from top to bottom


# -------------------------------------------------------------------------------- the logs


class Run(NamedTuple):
    name: str
    kind: str
    curves: dict[str, dict[int, float]]  # metric -> step -> value


def find_runs(paths: list[str]) -> list[Path]:
    """The folders that hold a metrics.jsonl, among these and below them."""
    found = []
    for path in map(Path, paths):
        check(path.is_dir(), f"{path}: no such folder")
        below = [path] if (path / "metrics.jsonl").exists() else sorted(f.parent for f in path.rglob("metrics.jsonl"))
        check(bool(below), f"{path}: no metrics.jsonl in it or below it; a run writes one")
        found += below
    return list(dict.fromkeys(folder.resolve() for folder in found))


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """{metric: {step: value}}, where the value is a finite number. (A nan is null in the log.)"""
    curves: dict[str, dict[int, float]] = {}
    for where, row in read_jsonl(folder / "metrics.jsonl"):
        check(is_number(row.get("step")), f'{where}: no "step" that is a number')
        for name, value in row.items():
            if name != "step" and is_number(value):
                curves.setdefault(name, {})[row["step"]] = float(value)
    check(bool(curves), f"{folder / 'metrics.jsonl'}: nothing was logged yet")
    return curves


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_runs(paths: list[str]) -> list[Run]:
    """The runs of these folders. The name of a run is its path in the deepest folder that holds them all."""
    folders = find_runs(paths)
    shared = os.path.commonpath([folder.parent for folder in folders])
    runs = []
    for folder in folders:
        curves = read_curves(folder)
        kind = next((kind for name, kind in KINDS.items() if name in curves), "Other")
        runs.append(Run(folder.relative_to(shared).as_posix(), kind, curves))
    return runs


def ordered(runs: list[Run], chosen: list[str]) -> list[str]:
    """The chosen metrics that these runs log. None chosen: all that they log, in the order of METRICS, then the
    others."""
    logged = list(dict.fromkeys(name for run in runs for name in run.curves))
    known = [name for name in METRICS if name in logged]
    return [name for name in chosen or [*known, *(n for n in logged if n not in METRICS)] if name in logged]


# -------------------------------------------------------------------------------- the figure


def draw(runs: list[Run], metrics: list[str]) -> Figure:
    """A section for each kind of run, and in it a panel for each metric."""
    sections = {kind: [run for run in runs if run.kind == kind] for kind in SECTIONS}
    names = {kind: ordered(section, metrics) for kind, section in sections.items()}
    shown = [kind for kind in SECTIONS if names[kind]]
    columns = columns_for(max(len(names[kind]) for kind in shown))
    heights = [section_height(len(names[kind]), len(sections[kind]), columns) for kind in shown]
    figure = Figure(figsize=(columns * PANEL[0], sum(heights)), layout="constrained")
    parts = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for kind, part in zip(shown, parts, strict=True):
        draw_section(part, kind, sections[kind], names[kind], columns)
    return figure


def columns_for(panels: int) -> int:
    """Panels side by side: at most three, and no gap for two or four."""
    return 2 if panels in (2, 4) else min(3, panels)


def section_height(panels: int, runs: int, columns: int) -> float:
    """Inches of a section: its rows of panels, its title, its legend, which has one entry more than there are runs."""
    return PANEL[1] * math.ceil(panels / columns) + TITLE + LEGEND * math.ceil((runs + 1) / columns)


def draw_section(part: SubFigure, kind: str, runs: list[Run], metrics: list[str], columns: int) -> None:
    rows = math.ceil(len(metrics) / columns)
    grid = part.subplots(rows, columns, sharex="all", squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(metrics):
            axes.remove()
            continue
        draw_panel(axes, metrics[number], runs)
        axes.tick_params(labelbottom=True)
        if number + columns >= len(metrics):  # the lowest panel of its column
            axes.set_xlabel("iteration" if kind == "Reinforcement learning" else "step")
    handles = [Line2D([], [], **line(i), label=run.name) for i, run in enumerate(runs)]
    if any(bounded(METRICS[name]) for name in metrics if name in METRICS):
        handles.append(Patch(color=HEALTHY, alpha=HEALTHY_ALPHA, label="healthy at the end of a run"))
    title = {"title": kind, "title_fontproperties": {"weight": "bold", "size": 13}, "alignment": "left"}
    part.legend(handles=handles, loc="outside upper left", ncols=columns, **title)


def draw_panel(axes: Axes, name: str, runs: list[Run]) -> None:
    metric = METRICS.get(name, Metric(name))
    logged = [(i, run.curves[name]) for i, run in enumerate(runs) if name in run.curves]
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


def plot_runs(runs: list[str], out: str | Path, metrics: list[str] | None = None) -> None:
    """Draw the metrics of some runs (None: all that they log) and write the figure. UserError names what is wrong."""
    check_figure_name(out)
    found = read_runs(runs)
    logged = ordered(found, [])
    for name in metrics or []:
        check(name in logged, f"--metrics {name}: not logged by these runs, which log {', '.join(logged)}")
    with style():
        figure = draw(found, metrics or [])
    save(figure, out)
    n = len(found)
    print(f"{out}: {n} run{'s' * (n > 1)}, {len(metrics or logged)} metrics")


def run(config: Config) -> dict:
    out = Path(config.runs[0]) / "curves.svg" if config.out == "auto" else Path(config.out)
    plot_runs(config.runs, out, config.metrics)
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
