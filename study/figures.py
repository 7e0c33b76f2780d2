"""Draws the study's figures from its results: results.json -> assets/*.svg. And the course's picture of a run of PPO.

python -m study.figures --results study/results.json --assets assets
python -m study.figures --ppo out/ppo                                   # ppo_curves.svg as well
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lib.cli import Flags, flag, run_main
from study.metrics import METRICS
from study.results import BLOCK, SHAPES, fitted, log_of, read
from study.style import COLOURS, HEALTHY, HEALTHY_ALPHA, TEXT, line, save, style
from study.tables import MAXIMISED


@dataclass
class Config(Flags):
    results: str = flag("study/results.json", "results of the study, as study.run writes them")
    assets: str = flag("assets", "folder for the figures")
    ppo: str = flag("", "a run of ppo.py: draw its curves too (study.report shows all metrics of any run)")


def bars(axes: Axes, places: list, figures: list[dict], across: bool = False, **look) -> None:
    """Means with their 95% intervals over seeds. places: their x, or with across their y (the bars are horizontal)."""
    means = [f["mean"] for f in figures]
    halves = [f["mean"] - f["low"] if f["low"] is not None else 0.0 for f in figures]
    look = {"capsize": 0, "elinewidth": 1.0, **look}
    if across:
        axes.errorbar(means, places, xerr=halves, **look)
    else:
        axes.errorbar(places, means, yerr=halves, **look)


def along(points: Iterable[dict], key: str) -> list[float]:
    """The mean of distance, or of kl, at each point of a curve."""
    return [p[key]["mean"] for p in points]


def golds(points: Iterable[dict]) -> list[dict]:
    """The true reward at each point of a curve."""
    return [p["gold"] for p in points]


def legend(figure: Figure, *panels: Axes, columns: int = 3) -> None:
    """One legend below all panels, where it hides nothing. Each label stands in it once."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=9)


def fit_line(axes: Axes, run: dict, key: str, form: str, **look) -> None:
    """The fitted curve of Gao et al. through the points of a run."""
    d = np.linspace(0, max(along(run["points"], "distance")), 80)
    axes.plot(d, [fitted(run[f"{key}_fit"], x, SHAPES[form]) for x in d], linewidth=1.1, **look)


def three_reward_models(results: dict) -> Figure:
    """The picture of README.md: PPO without a penalty against three reward models. From one panel to the next a single
    thing differs, first the number of rankings, then the head. Thin lines: seeds."""
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    rl, maximised = results["overoptimisation"]["rl"], results["secret"]["maximised"]
    runs = {
        "300 rankings": rl["weak_0"],
        "5,000 rankings": maximised["plain"],
        "5,000, better head": rl["strong_0"],
    }
    for axes, (label, run) in zip(panels, runs.items(), strict=True):
        x = [BLOCK * (k + 1) for k in range(len(run["points"]))]
        for key, colour, title in (("score", "orange", "reward model's opinion"), ("gold", "blue", "true reward")):
            for seed in zip(*(p[key]["seeds"] for p in run["points"]), strict=True):
                axes.plot(x, seed, color=COLOURS[colour], linewidth=0.6)
            means = [p[key]["mean"] for p in run["points"]]
            axes.plot(x, means, color=COLOURS[colour], linewidth=2.4, label=f"{title} (mean)")
        before = results["feedback"]["sft"]["gold"]["mean"]
        axes.axhline(before, color=TEXT, linestyle=(0, (1, 1.5)), linewidth=1.2, label="true reward before")
        axes.set_title(label)
        axes.set_xticks([10, 20, 30, 40])
        axes.set_xlabel("iterations of PPO")
    panels[0].set_ylabel("reward")
    legend(figure, panels[0])
    return figure


def overoptimisation(results: dict, rl: bool) -> Figure:
    """True reward and the reward model's opinion against the distance from SFT, by RL or by best of n."""
    figure = Figure(figsize=(6.8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    form = "rl" if rl else "best_of_n"
    runs = results["overoptimisation"][form]
    names = ("weak_0", "strong_0") if rl else ("weak_0", "reward_model")
    labels = ("300 rankings, plain head", "5,000, told expectations")  # both differ: `three_reward_models` parts them
    look = {"markersize": 4, "linestyle": "none"}
    for axes, name, label in zip((left, right), names, labels, strict=True):
        x, points = along(runs[name]["points"], "distance"), runs[name]["points"]
        opinion = {"color": COLOURS["orange"], "marker": "s", "label": "reward model's opinion"}
        bars(axes, x, [p["score"] for p in points], **opinion, **look)
        fit_line(axes, runs[name], "score", form, color=COLOURS["orange"])
        bars(axes, x, golds(points), color=COLOURS["blue"], marker="o", label="true reward", **look)
        fit_line(axes, runs[name], "gold", form, color=COLOURS["blue"])
        if rl:  # the same with the default penalty
            points = runs[name.replace("_0", "_0.1")]["points"]
            penalised = {"color": COLOURS["green"], "marker": "^", "label": "true reward, kl_coef 0.1"}
            bars(axes, along(points, "distance"), golds(points), **penalised, **look)
        axes.set_title(label)
        axes.set_xlabel("distance from SFT, sqrt(KL in nats)")
    left.set_ylabel("reward")
    legend(figure, left)
    return figure


def ensembles(results: dict) -> Figure:
    """The true reward when one weak reward model is maximised, and when the minimum of four is, or their mean less
    their standard deviation."""
    figure = Figure(figsize=(6.8, 3.5), layout="constrained")
    panels = figure.subplots(1, 2)
    runs = {"rl": ("weak_0", "min_0", "mean-std_0"), "best_of_n": ("weak_0", "min", "mean-std")}
    for axes, (family, names) in zip(panels, runs.items(), strict=True):
        for number, (name, label) in enumerate(zip(names, ("one model", "minimum", "mean - std"), strict=True)):
            points = results["overoptimisation"][family][name]["points"]
            look = {"label": label, "marker": "o", "markersize": 3.5, **line(number)}
            bars(axes, along(points, "distance"), golds(points), **look)
        axes.set_title("PPO, kl_coef 0" if family == "rl" else "best of n")
        axes.set_ylim(-1.7, 2.9)  # cuts some of the minimum's intervals off
        axes.set_xlabel("distance from SFT, sqrt(KL in nats)")
    panels[0].set_ylabel("true reward")
    legend(figure, panels[0])
    return figure


METHODS = {  # name in the results: label, colour, marker
    "ppo": ("PPO", "blue", "o"),
    "grpo": ("GRPO", "orange", "s"),
    "rloo": ("RLOO", "pink", "D"),
    "dpo": ("DPO", "green", "^"),
    "ipo": ("IPO", "olive", "v"),
    "sft_best": ("SFT on the best of 4", "violet", "P"),
    "sft": ("SFT", "violet", "x"),
}


def frontier(results: dict) -> Figure:
    """True reward against KL: a point for each coefficient of each method, and the curve of best of n."""
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.subplots()
    for method, (label, colour, marker) in METHODS.items():
        points = sorted(results["frontier"][method].values(), key=lambda p: p["kl"]["mean"])
        look = {"color": COLOURS[colour], "marker": marker, "markersize": 5, "linewidth": 1.2}
        bars(axes, along(points, "kl"), golds(points), label=label, **look)
    points = results["overoptimisation"]["best_of_n"]["reward_model"]["points"]
    x = [d**2 for d in along(points, "distance")]
    look = {"color": TEXT, "linestyle": (0, (5, 2)), "linewidth": 1.2, "marker": ".", "label": "best of n"}
    bars(axes, x, golds(points), **look)
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.6)
    ticks = [0, 0.5, 1, 2, 3, 4, 5, 10, 20, 50]
    limit = max(x[-1], *(kl for points in results["frontier"].values() for kl in along(points.values(), "kl")))
    axes.set_xticks([t for t in ticks if t <= 1.1 * limit], [str(t) for t in ticks if t <= 1.1 * limit])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("KL to SFT, nats a sequence")
    axes.set_ylabel("true reward")
    legend(figure, axes, columns=4)
    return figure


def feedback(results: dict) -> Figure:
    """The reward model's accuracy and the true reward against the number and against the noise of rankings."""
    figure = Figure(figsize=(6.8, 6.2), layout="constrained")
    panels = figure.subplots(2, 2)
    groups = (("numbers", "rankings"), ("noises", "annotators' noise (temperature)"))
    for row, (group, label) in zip(panels, groups, strict=True):
        points = list(results["feedback"][group].values())
        x = [float(key) for key in results["feedback"][group]]
        for number, part in enumerate(("right_vs_wrong", "polite_vs_plain", "short_vs_rambling")):
            look = {"label": part.replace("_", " "), "marker": "o", **line(number)}
            bars(row[0], x, [p["by_part"][part] for p in points], **look)
        for number, method in enumerate(("ppo", "dpo")):
            bars(row[1], x, golds(p[method] for p in points), label=method.upper(), marker="o", **line(number))
        row[1].axhline(results["feedback"]["sft"]["gold"]["mean"], color=TEXT, linestyle=(0, (1, 1.5)), label="SFT")
        row[0].set_title("reward model's accuracy")
        row[1].set_title("true reward")
        for axes in row:
            axes.set_xlabel(label)
            if group == "numbers":
                axes.set_xscale("log")
                axes.set_xticks(x, [f"{n:,.0f}" for n in x])
                axes.set_xticks([], minor=True)
            else:
                axes.set_xticks(x, [f"{t:g}" for t in x])
    legend(figure, *panels.flat)
    return figure


def iterated(results: dict) -> Figure:
    """Accuracy on facts and true reward after one round and after two, for both heads of the reward model."""
    figure = Figure(figsize=(6.8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("right", "gold"), ("right against wrong", "true reward of PPO"), strict=True):
        for number, (head, label) in enumerate((("plain", "scalar head"), ("told", "told expectations"))):
            rounds = [p for name, p in results["iterated"][head].items() if name != "gain"]
            figures = [p["by_part"]["right_vs_wrong"] for p in rounds] if key == "right" else golds(rounds)
            look = line(number) | {"linestyle": "none", "marker": "os"[number], "markersize": 5, "label": label}
            bars(axes, [i + 0.12 * (2 * number - 1) for i in range(len(rounds))], figures, **look)
        axes.set_xticks(range(3), ["first half", "+ PPO's", "+ SFT's"])
        axes.set_title(title)
        axes.set_xlim(-0.5, 2.5)
    legend(figure, panels[0])
    return figure


def secret(results: dict) -> Figure:
    """DPO's implicit reward and scalar heads: left as judges, right as what PPO maximises."""
    figure = Figure(figsize=(6.8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    judges = results["secret"]["judges"]
    parts = list(next(iter(judges.values())))
    labels = list(MAXIMISED.values())
    for number, accuracy in enumerate(judges.values()):
        y = [-i - 0.2 * (number - 1) for i in range(len(parts))]
        look = line(number) | {"marker": "o", "linestyle": "none", "markersize": 4, "label": labels[number]}
        bars(left, y, [accuracy[part] for part in parts], across=True, **look)
    left.set_yticks([-i for i in range(len(parts))], [part.replace("_", " ") for part in parts])
    left.set_xlim(-0.02, 1.02)
    left.set_title("pairs in the right order")
    for number, (name, label) in enumerate(MAXIMISED.items()):
        points = results["secret"]["maximised"][name]["points"]
        x = [max(kl, 0.05) for kl in along(points, "kl")]
        bars(right, x, golds(points), label=label, marker="o", markersize=3.5, **line(number))
    right.set_xscale("log")
    right.set_xticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
    right.set_xticks([], minor=True)
    right.set_ylim(-3.4, 3.1)  # cuts two of the intervals off
    right.set_xlabel("KL to SFT, nats a sequence")
    right.set_title("true reward when maximised")
    legend(figure, left, right, columns=4)
    return figure


def breaks(results: dict) -> Figure:
    """A row for each mistake: what it changes, with its interval."""
    figure = Figure(figsize=(6.8, 5.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    names = list(results["breaks"])
    # wide enough for all but a run that has collapsed: its number stands at the edge
    columns = (("gold", "true reward", (-2.0, 0.8)), ("kl", "KL, nats", (-2.6, 3.6)), ("length", "length", (-2.2, 2.2)))
    for axes, (key, title, limits) in zip(panels, columns, strict=True):
        axes.set_xlim(*limits)
        for i, name in enumerate(names):
            change = results["breaks"][name]["change"][key]
            clear = change["low"] is not None and (change["low"] > 0 or change["high"] < 0)
            colour = COLOURS["orange"] if clear else TEXT
            if change["mean"] > limits[1]:
                axes.text(limits[1], -i, f"{change['mean']:+.1f} \u2192", color=colour, ha="right", va="center")
            else:
                bars(axes, [-i], [change], across=True, color=colour, marker="o", markersize=4, elinewidth=1.4)
        axes.axvline(0, color=TEXT, linewidth=0.8)
        axes.set_title(title)
    panels[0].set_yticks([-i for i in range(len(names))], [name.replace("_", " ") for name in names])
    panels[1].set_xlabel("change against the run without the mistake")
    return figure


def ppo_curves(rows: list[dict]) -> Figure:
    """Six metrics of a run of PPO, a row for each iteration. The range that is healthy at the end is shaded, and its
    limits stand above the panel."""
    figure = Figure(figsize=(9.3, 4.4), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    names = ("score", "gold", "kl", "entropy", "explained_variance", "clip_fraction")
    for axes, name in zip(panels.flat, names, strict=True):
        metric = METRICS[name]
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], **line(0))
        axes.set_title(metric.title)
        axes.set_ylabel(metric.unit)
        if metric.low is not None:
            seen = axes.get_ylim()  # of the data: all of a range up to 15 would press a KL of 1 flat
            axes.axhspan(metric.low, metric.high, color=HEALTHY, alpha=HEALTHY_ALPHA, linewidth=0)
            axes.set_ylim(*seen)
            axes.set_title(f"{metric.low:g} to {metric.high:g}", loc="right", size=9, weight="normal", color=HEALTHY)
    figure.supxlabel("iteration", size="medium")
    return figure


FIGURES: dict[str, Callable[[dict], Figure]] = {
    "three_reward_models": three_reward_models,
    "overoptimisation": lambda results: overoptimisation(results, rl=True),
    "best_of_n": lambda results: overoptimisation(results, rl=False),
    "ensembles": ensembles,
    "frontier": frontier,
    "feedback": feedback,
    "iterated": iterated,
    "secret": secret,
    "breaks": breaks,
}


def run(config: Config) -> dict:
    results, folder = read(config.results), Path(config.assets)
    with style():
        for name, make in FIGURES.items():
            save(make(results), folder / f"{name}.svg")
        if config.ppo:
            save(ppo_curves(log_of(config.ppo)), folder / "ppo_curves.svg")
    print(f"{len(FIGURES) + bool(config.ppo)} figures in {folder}")
    return {}


def main() -> None:
    run_main(run, Config, __doc__)


if __name__ == "__main__":
    main()
