"""study/figures.py: every line of every figure is of the run that its label and its panel say, with its intervals."""

from __future__ import annotations

import json
import math

import pytest
from helpers import ROOT
from matplotlib.axes import Axes

from study import figures

FOUND = json.loads((ROOT / "study" / "results.json").read_text(encoding="utf-8"))
OVER, MAXIMISED = FOUND["overoptimisation"], FOUND["secret"]["maximised"]
METHODS = {"PPO": "ppo", "GRPO": "grpo", "RLOO": "rloo", "DPO": "dpo", "IPO": "ipo"}
METHODS |= {"SFT on the best of 4": "sft_best", "SFT": "sft"}


def means(points, key: str = "gold") -> list[float]:
    return [p[key]["mean"] for p in points]


def panels(name: str) -> dict[str, Axes]:
    """The panels of a figure by their titles; one without a title by its x label."""
    return {axes.get_title() or axes.get_xlabel(): axes for axes in figures.FIGURES[name](FOUND).axes}


def bars(axes: Axes) -> dict[str, tuple[list[float], list[float], list[tuple[float, float]]]]:
    """{label: (x, y, ends of the intervals)}"""
    found = {}
    for container in axes.containers:
        data, _, (segments,) = container.lines
        along = 0 if container.has_xerr else 1
        ends = [tuple(end[along] for end in segment) for segment in segments.get_segments()]
        found[container.get_label()] = (list(data.get_xdata()), list(data.get_ydata()), ends)
    return found


def check(found, x: list[float], figures: list[dict]) -> None:
    """Means and intervals of these figures at x."""
    assert found[0] == pytest.approx(x) and found[1] == pytest.approx([f["mean"] for f in figures])
    # drawn as far down as up: rounded to four digits a side may be longer by one
    assert found[2] == [pytest.approx((f["low"], f["high"]), abs=2e-4) for f in figures]


def distances(run: dict) -> list[float]:
    return means(run["points"], "distance")


def golds(points) -> list[dict]:
    return [p["gold"] for p in points]


def test_three_reward_models():
    """The picture of README.md."""
    shown = panels("three_reward_models")
    runs = {
        "300 rankings": OVER["rl"]["weak_0"],
        "5,000 rankings": MAXIMISED["plain"],
        "5,000, better head": OVER["rl"]["strong_0"],
    }
    assert list(shown) == list(runs)
    for title, run in runs.items():
        lines = shown[title].lines
        named = {line.get_label(): line for line in lines}
        for label, key in (("true reward (mean)", "gold"), ("reward model's opinion (mean)", "score")):
            assert list(named[label].get_ydata()) == means(run["points"], key)
            assert list(named[label].get_xdata()) == [5 * (k + 1) for k in range(len(run["points"]))]
            thin = [line for line in lines if line.get_color() == named[label].get_color() and line != named[label]]
            seeds = [list(seed) for seed in zip(*(p[key]["seeds"] for p in run["points"]), strict=True)]
            assert [list(line.get_ydata()) for line in thin] == seeds
        assert set(named["true reward before"].get_ydata()) == {FOUND["feedback"]["sft"]["gold"]["mean"]}


@pytest.mark.parametrize(
    ("name", "form", "runs"),
    [("overoptimisation", "rl", ("weak_0", "strong_0")), ("best_of_n", "best_of_n", ("weak_0", "reward_model"))],
)
def test_over_optimisation(name, form, runs):
    """Points, and the curves through them: value = start + d (alpha - beta shape(d))."""
    for axes, run in zip(panels(name).values(), runs, strict=True):
        found, drawn = OVER[form][run], bars(axes)
        check(drawn["true reward"], distances(found), golds(found["points"]))
        check(drawn["reward model's opinion"], distances(found), [p["score"] for p in found["points"]])
        if form == "rl":
            penalised = OVER["rl"][run.replace("_0", "_0.1")]
            check(drawn["true reward, kl_coef 0.1"], distances(penalised), golds(penalised["points"]))
        curves = [line for line in axes.lines if len(line.get_xdata()) == 80]
        assert len(curves) == 2
        for line, key in zip(curves, ("score", "gold"), strict=True):
            fit, d = found[f"{key}_fit"], line.get_xdata()[-1]
            shape = math.log(d) if form == "rl" else d
            assert d == max(distances(found))
            assert line.get_ydata()[-1] == pytest.approx(fit["start"] + d * (fit["alpha"] - fit["beta"] * shape))
            assert line.get_ydata()[0] == fit["start"]


def test_ensembles():
    for title, form, runs in (
        ("PPO, kl_coef 0", "rl", ("weak_0", "min_0", "mean-std_0")),
        ("best of n", "best_of_n", ("weak_0", "min", "mean-std")),
    ):
        drawn = bars(panels("ensembles")[title])
        for label, run in zip(("one model", "minimum", "mean - std"), runs, strict=True):
            check(drawn[label], distances(OVER[form][run]), golds(OVER[form][run]["points"]))


def test_frontier():
    """A point for each coefficient, from the smallest KL to the largest, in whatever order the results have them."""
    backwards = {method: dict(reversed(points.items())) for method, points in FOUND["frontier"].items()}
    (axes,) = figures.frontier({**FOUND, "frontier": backwards}).axes
    drawn = bars(axes)
    assert set(drawn) == {*METHODS, "best of n"}
    for label, method in METHODS.items():
        points = sorted(backwards[method].values(), key=lambda p: p["kl"]["mean"])
        check(drawn[label], means(points, "kl"), golds(points))
    best = OVER["best_of_n"]["reward_model"]
    check(drawn["best of n"], [d**2 for d in distances(best)], golds(best["points"]))


def test_feedback():
    axes = figures.FIGURES["feedback"](FOUND).axes
    for row, group in ((axes[:2], "numbers"), (axes[2:], "noises")):
        points, x = list(FOUND["feedback"][group].values()), [float(key) for key in FOUND["feedback"][group]]
        accuracy, reward = map(bars, row)
        for label in ("right vs wrong", "polite vs plain", "short vs rambling"):
            check(accuracy[label], x, [p["by_part"][label.replace(" ", "_")] for p in points])
        for label in ("PPO", "DPO"):
            check(reward[label], x, golds(p[label.lower()] for p in points))
        (sft,) = [line for line in row[1].lines if line.get_label() == "SFT"]
        assert set(sft.get_ydata()) == {FOUND["feedback"]["sft"]["gold"]["mean"]}


def test_iterated():
    shown = {title: bars(axes) for title, axes in panels("iterated").items()}
    for number, (label, head) in enumerate((("scalar head", "plain"), ("told expectations", "told"))):
        rounds = [p for name, p in FOUND["iterated"][head].items() if name != "gain"]
        x = [i + (-0.12, 0.12)[number] for i in range(3)]
        check(shown["right against wrong"][label], x, [p["by_part"]["right_vs_wrong"] for p in rounds])
        check(shown["true reward of PPO"][label], x, golds(rounds))


def test_secret():
    shown = panels("secret")
    judged, maximised = bars(shown["pairs in the right order"]), bars(shown["true reward when maximised"])
    names = ["DPO's implicit reward", "scalar head", "scalar head that is told expectations"]
    assert list(FOUND["secret"]["judges"]) == names and len(judged) == 3
    for accuracy, (x, _, ends) in zip(FOUND["secret"]["judges"].values(), judged.values(), strict=True):
        assert x == pytest.approx([part["mean"] for part in accuracy.values()])
        assert ends == [pytest.approx((part["low"], part["high"]), abs=2e-4) for part in accuracy.values()]
    for (label, drawn), name in zip(maximised.items(), ("implicit", "plain", "told", "gold"), strict=True):
        assert label == figures.MAXIMISED[name]
        points = MAXIMISED[name]["points"]
        check(drawn, [max(kl, 0.05) for kl in means(points, "kl")], golds(points))


def test_breaks():
    """Orange is what is clear: an interval that leaves 0 out. What is far beyond the edge is a number there."""
    shown = panels("breaks")
    assert list(shown) == ["true reward", "KL, nats", "length"]
    labels = [label.get_text() for label in shown["true reward"].get_yticklabels()]
    assert labels == [name.replace("_", " ") for name in FOUND["breaks"]]
    for axes, key in zip(shown.values(), ("gold", "kl", "length"), strict=True):
        drawn = {round(-c.lines[0].get_ydata()[0]): c for c in axes.containers}
        texts = {round(-text.get_position()[1]): text for text in axes.texts}
        assert sorted([*drawn, *texts]) == list(range(len(FOUND["breaks"])))
        for i, (name, found) in enumerate(FOUND["breaks"].items()):
            change = found["change"][key]
            clear = change["low"] > 0 or change["high"] < 0
            colour = texts[i].get_color() if i in texts else drawn[i].lines[0].get_color()
            assert (colour == figures.COLOURS["orange"]) == clear, name
            if i in texts:
                assert texts[i].get_text().startswith(f"{change['mean']:+.1f}") and change["mean"] > axes.get_xlim()[1]
            else:
                assert drawn[i].lines[0].get_xdata()[0] == change["mean"]


def test_every_figure_is_written(tmp_path, capsys):
    """Under its own name, as an SVG; `run` takes the results from the file that is named."""
    results = tmp_path / "results.json"
    results.write_text(json.dumps(FOUND), encoding="utf-8")
    figures.run(figures.Config(results=str(results), assets=str(tmp_path / "assets")))
    written = sorted(path.name for path in (tmp_path / "assets").iterdir())
    assert written == sorted(f"{name}.svg" for name in figures.FIGURES) and len(written) == 9
    assert "9 figures" in capsys.readouterr().out
    shipped = {path.name for path in (ROOT / "assets").glob("*.svg")}
    assert set(written) <= shipped
