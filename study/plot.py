"""A figure of every metric of one or several runs, with the healthy range shaded.

    python -m study.plot out/ppo                                     # -> out/ppo/curves.svg
    python -m study.plot out                                         # all stages below out, one section a kind
    python -m study.plot out/ppo out/grpo --out both.png --metrics score kl gold
    python -m study.plot out/1/ppo out/2/ppo out/3/ppo --mean        # seeds: their mean, and from lowest to highest

What comes before the first flag are runs: folders that hold a metrics.jsonl, or in which there are such folders. Runs
of one kind (SFT, reward model, reinforcement learning, DPO) share a section, and in it each metric has a panel. How to
read them stands in docs/tuning.md, "Reading the metrics"; the ranges in metrics.py.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import takewhile
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
    runs: list[str] = flag(["out"], "runs, or folders of runs; `--runs` itself may be left out where they come first")
    out: str = flag("auto", "figure to write, .svg, .png or .pdf (auto: curves.svg in the first folder)")
    metrics: list[str] = flag([], "metrics to show, in this order (none: all that were logged)")
    mean: bool = flag(False, "runs of one folder name are seeds: their mean, shaded from the lowest to the highest")


PANEL = (3.1, 2.1)  # inches, width and height
TITLE, LEGEND = 0.4, 0.25  # inches, a section's title and each row of its legend

# A run is of the first kind whose metric it logs.
KINDS = {"score": "Reinforcement learning", "margin": "DPO", "accuracy": "Reward model", "loss": "SFT"}
SECTIONS = ("SFT", "Reward model", "Reinforcement learning", "DPO", "Other")  # from the top, in the pipeline's order


# -------------------------------------------------------------------------------- what was logged


class Run(NamedTuple):
    name: str
    kind: str
    curves: dict[str, dict[int, float]]  # metric -> step -> value


def find_runs(paths: list[str]) -> list[Path]:
    """The folders that hold a metrics.jsonl: these, or those below them."""
    found = []
    for path in map(Path, paths):
        check(path.is_dir(), f"{path}: no such folder")
        below = [path] if (path / "metrics.jsonl").exists() else sorted(f.parent for f in path.rglob("metrics.jsonl"))
        check(bool(below), f"{path}: no metrics.jsonl in it or below it; a run writes one")
        found += below
    return list(dict.fromkeys(folder.resolve() for folder in found))


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """metric -> step -> value, where the value is a finite number. What was nan stands as null in the log."""
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
    """Each is named by its path from the deepest folder that holds them all."""
    folders = find_runs(paths)
    levels = zip(*(folder.parent.parts for folder in folders), strict=False)  # the drive or root of each, ...
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    runs = []
    for folder in folders:
        curves = read_curves(folder)
        kind = next((kind for name, kind in KINDS.items() if name in curves), "Other")
        runs.append(Run("/".join(folder.parts[shared:]), kind, curves))
    return runs


def ordered(runs: list[Run], chosen: list[str]) -> list[str]:
    """The metrics that these runs log and that were chosen; all of them stand in the order of METRICS, and then those
    that it doesn't know."""
    logged = list(dict.fromkeys(name for run in runs for name in run.curves))
    known = [name for name in METRICS if name in logged]
    return [name for name in chosen or [*known, *(n for n in logged if n not in METRICS)] if name in logged]


# -------------------------------------------------------------------------------- several seeds


class Series(NamedTuple):
    """One line of a panel."""

    steps: list[int]
    values: list[float]
    lowest: list[float]  # of several seeds, else the values
    highest: list[float]


def series_of(runs: list[Run], metric: str) -> Series:
    """The mean of some runs, with lowest and highest, at the steps at which all that log the metric have a value: a
    mean over fewer runs at one step than at the next would jump where none of them does. One run: its values."""
    curves = [run.curves[metric] for run in runs if metric in run.curves]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    return Series(steps, [sum(v) / len(v) for v in values], [min(v) for v in values], [max(v) for v in values])


def lines_of(runs: list[Run], mean: bool) -> dict[str, list[Run]]:
    """Label -> the runs that are one line."""
    if not mean:
        return {run.name: [run] for run in runs}
    seeds: dict[str, list[Run]] = {}
    for run in runs:
        seeds.setdefault(run.name.rpartition("/")[2], []).append(run)
    note = {name: f", mean and range of {len(group)}" if len(group) > 1 else "" for name, group in seeds.items()}
    return {name + note[name]: group for name, group in seeds.items()}


# -------------------------------------------------------------------------------- the figure


def draw(runs: list[Run], metrics: list[str], mean: bool = False) -> Figure:
    """A section for each kind of run, in it a panel for each metric."""
    sections = {kind: [run for run in runs if run.kind == kind] for kind in SECTIONS}
    names = {kind: ordered(section, metrics) for kind, section in sections.items()}
    shown = [kind for kind in SECTIONS if names[kind]]
    lines = {kind: lines_of(sections[kind], mean) for kind in shown}
    columns = columns_for(max(len(names[kind]) for kind in shown))
    heights = [section_height(len(names[kind]), len(lines[kind]), columns) for kind in shown]
    figure = Figure(figsize=(columns * PANEL[0], sum(heights)), layout="constrained")
    parts = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for kind, part in zip(shown, parts, strict=True):
        draw_section(part, kind, lines[kind], names[kind], columns)
    return figure


def columns_for(panels: int) -> int:
    return 2 if panels in (2, 4) else min(3, panels)


def section_height(panels: int, lines: int, columns: int) -> float:
    """Inches of the rows of panels, the title and the legend, which has one more entry than lines."""
    return PANEL[1] * math.ceil(panels / columns) + TITLE + LEGEND * math.ceil((lines + 1) / columns)


def draw_section(part: SubFigure, kind: str, lines: dict[str, list[Run]], metrics: list[str], columns: int) -> None:
    rows = math.ceil(len(metrics) / columns)
    grid = part.subplots(rows, columns, sharex="all", squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(metrics):
            axes.remove()
            continue
        name = metrics[number]
        draw_panel(axes, METRICS.get(name, Metric(name, "", None, None, "")), lines, name)
        axes.tick_params(labelbottom=True)
        if number + columns >= len(metrics):  # the lowest of its column
            axes.set_xlabel("iteration" if kind == "Reinforcement learning" else "step")
    handles = [Line2D([], [], **line(i), label=label) for i, label in enumerate(lines)]
    if any(bounded(METRICS[name]) for name in metrics if name in METRICS):
        handles.append(Patch(color=HEALTHY, alpha=HEALTHY_ALPHA, label="healthy at the end of a run"))
    title = {"title": kind, "title_fontproperties": {"weight": "bold", "size": 13}, "alignment": "left"}
    part.legend(handles=handles, loc="outside upper left", ncols=columns, **title)


def draw_panel(axes: Axes, metric: Metric, lines: dict[str, list[Run]], name: str) -> None:
    lowest, highest = math.inf, -math.inf
    for i, runs in enumerate(lines.values()):
        s = series_of(runs, name)
        if not s.steps:
            continue
        axes.plot(s.steps, s.values, **line(i), marker="o" if len(s.steps) == 1 else None)
        if len(runs) > 1:
            axes.fill_between(s.steps, s.lowest, s.highest, color=line(i)["color"], alpha=0.2, linewidth=0)
        lowest, highest = min(lowest, *s.lowest), max(highest, *s.highest)
    axes.set_title(metric.title)
    axes.set_ylabel(metric.unit)
    axes.locator_params(axis="x", integer=True, nbins=5)
    axes.locator_params(axis="y", nbins=4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")  # never a factor or an offset above the panel
    if lowest <= highest:
        low, high = view(lowest, highest, metric)
        axes.set_ylim(low, high)
        if bounded(metric):
            shade(axes, metric, low, high)


def view(lowest: float, highest: float, metric: Metric) -> tuple[float, float]:
    """What a panel shows of the y axis: the data, and enough of the healthy range to see where they are in it.

    All of the range would press a KL of 1 flat under a limit of 15, so a third of its width is enough; of data outside
    it at least the nearer limit is seen."""
    if metric.low is not None and highest < metric.low:
        highest = metric.low
    if metric.high is not None and lowest > metric.high:
        lowest = metric.high
    if metric.low is not None and metric.high is not None:
        missing = max(0.0, (metric.high - metric.low) / 3 - (highest - lowest))
        if lowest + highest < metric.low + metric.high:  # towards the middle of the range
            highest += missing
        else:
            lowest -= missing
    margin = 0.06 * (highest - lowest) or 0.1 * abs(highest) or 1.0
    return lowest - margin, highest + margin


def shade(axes: Axes, metric: Metric, low: float, high: float) -> None:
    """The healthy range, to the edge of the panel where it has no limit, and its limits in numbers."""
    bottom, top = (low if metric.low is None else metric.low), (high if metric.high is None else metric.high)
    axes.axhspan(bottom, top, color=HEALTHY, alpha=HEALTHY_ALPHA, linewidth=0)
    limits = f"{bottom:g} to {top:g}"
    if metric.low is None or metric.high is None:
        limits = f"at most {top:g}" if metric.low is None else f"at least {bottom:g}"
    axes.set_title(limits, loc="right", size=9, weight="normal", color=HEALTHY)


def plot_runs(runs: list[str], out: str | Path, metrics: list[str] | None = None, mean: bool = False) -> None:
    """Draw some runs and write the figure. metrics: none or an empty list for all that they log."""
    check_figure_name(out)
    found = read_runs(runs)
    logged = ordered(found, [])
    for name in metrics or []:
        check(name in logged, f"--metrics {name}: not logged by these runs, which log {', '.join(logged)}")
    with style():
        figure = draw(found, metrics or [], mean)
    save(figure, out)
    n = len(found)
    print(f"{out}: {n} run{'s' * (n > 1)}, {len(metrics or logged)} metrics")


def run(config: Config) -> dict:
    check(bool(config.runs), "name a run, as in `python -m study.plot out/ppo`")
    out = Path(config.runs[0]) / "curves.svg" if config.out == "auto" else Path(config.out)
    plot_runs(config.runs, out, config.metrics, config.mean)
    return {}


def main() -> None:
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--runs")
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
