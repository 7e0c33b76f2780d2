"""study/figures.py and style.py: what a figure shows is what was measured, and it can be read on either page."""

from __future__ import annotations

import functools
import json
import math
import re
from pathlib import Path

import matplotlib
import pytest
from helpers import ROOT
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lib.cli import UserError
from study import figures
from study.figures import FIGURES, ppo_curves
from study.metrics import METRICS
from study.style import COLOURS, HEALTHY, HEALTHY_ALPHA, TEXT, line, save, style

FOUND = json.loads((ROOT / "study" / "results.json").read_text(encoding="utf-8"))
CURVES = ("score", "gold", "kl", "entropy", "explained_variance", "clip_fraction")
ROWS = [{"step": 3 * i + 1, **{name: n + 0.01 * i * i for n, name in enumerate(CURVES)}} for i in range(5)]


@functools.cache
def drawings() -> dict[str, Figure]:
    """Every figure of the project, drawn."""
    with style():
        made = {name: make(FOUND) for name, make in FIGURES.items()} | {"ppo_curves": ppo_curves(ROWS)}
        for figure in made.values():
            FigureCanvasAgg(figure).draw()
    return made


# -------------------------------------------------------------------------------- what is shown


def test_the_curves_of_ppo_are_what_was_logged():
    """A line that belongs to another metric, lacks a point, or is drawn over row numbers and not over steps. A healthy
    range of other limits, where the metric has none, or so large that a KL of 1 is a flat line."""
    with style():
        figure = ppo_curves(ROWS)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [METRICS[name].title for name in CURVES]
    for name, axes in zip(CURVES, figure.axes, strict=True):
        (drawn,) = axes.lines
        assert [tuple(xy) for xy in drawn.get_xydata()] == [(row["step"], row[name]) for row in ROWS]
        bottom, top = axes.get_ylim()
        assert bottom <= ROWS[0][name] < ROWS[-1][name] <= top and top - bottom < 0.5
        limits = [METRICS[name].low, METRICS[name].high]
        bands = [[band.get_y(), band.get_y() + band.get_height()] for band in axes.patches]
        assert bands == ([] if limits == [None, None] else [pytest.approx(limits)])
        assert all(to_hex(band.get_facecolor()) == HEALTHY for band in axes.patches)
        written = [float(n) for n in re.findall(r"-?[\d.]+", axes.get_title(loc="right"))]
        assert written == [x for x in limits if x is not None]
        assert axes.get_ylabel() == METRICS[name].unit
    assert len({METRICS[name].unit for name in CURVES}) > 2 and figure.get_supxlabel() == "iteration"


def test_no_two_metrics_have_one_title():
    """Two charts that nobody can tell apart."""
    titles = [metric.title for metric in METRICS.values()]
    assert len(set(titles)) == len(titles)


# -------------------------------------------------------------------------------- the study

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
        for fitted, key in zip(curves, ("score", "gold"), strict=True):
            fit, d = found[f"{key}_fit"], fitted.get_xdata()[-1]
            shape = math.log(d) if form == "rl" else d
            assert d == max(distances(found))
            assert fitted.get_ydata()[-1] == pytest.approx(fit["start"] + d * (fit["alpha"] - fit["beta"] * shape))
            assert fitted.get_ydata()[0] == fit["start"]


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


def ticks(labels) -> list[str]:
    return [label.get_text() for label in labels]


def test_what_is_measured_stands_at_the_axes():
    """The noise's panels under the title of the number of rankings, a round's or a part's figures beside another's
    name: all points are right, and all that is read off them is wrong."""
    axes = figures.FIGURES["feedback"](FOUND).axes
    assert [a.get_xlabel() for a in axes] == ["rankings"] * 2 + ["annotators' noise (temperature)"] * 2
    numbers, noises = (FOUND["feedback"][group] for group in ("numbers", "noises"))
    assert [ticks(a.get_xticklabels()) for a in axes[:2]] == [[f"{int(n):,}" for n in numbers]] * 2
    assert [ticks(a.get_xticklabels()) for a in axes[2:]] == [[f"{float(t):g}" for t in noises]] * 2
    assert list(FOUND["iterated"]["told"])[:3] == [
        "first half",
        "half of the first policy's samples",
        "all of SFT's samples",
    ]
    for panel in panels("iterated").values():
        assert ticks(panel.get_xticklabels()) == ["first half", "+ PPO's", "+ SFT's"]
    left = panels("secret")["pairs in the right order"]
    parts = next(iter(FOUND["secret"]["judges"].values()))
    assert ticks(left.get_yticklabels()) == [part.replace("_", " ") for part in parts]
    assert list(left.get_yticks()) == [-i for i in range(len(parts))]


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


# -------------------------------------------------------------------------------- the file


def test_the_first_20_runs_differ_and_four_in_a_row_in_grey_too():
    """Colours and dashes that repeat together: two runs that look the same."""
    looks = [line(i) for i in range(20)]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 20
    for i in range(17):
        assert len({str(look["linestyle"]) for look in looks[i : i + 4]}) == 4


def test_a_rerun_gives_the_same_bytes(tmp_path, monkeypatch):
    """A date, a random id or the reader's own settings in the file: every rerun would be a change to commit."""
    files = []
    for number, colour in enumerate(("red", "blue")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(10**9 * number))
        monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", colour)
        monkeypatch.setitem(matplotlib.rcParams, "xtick.major.size", 7.0 + number)
        files.append(tmp_path / f"{number}.svg")
        with style():
            save(ppo_curves(ROWS), files[-1])
        assert matplotlib.rcParams["axes.facecolor"] == colour  # and they are the reader's again
    assert files[0].read_bytes() == files[1].read_bytes()
    text = files[0].read_text(encoding="utf-8")
    assert text.startswith("<?xml") and "date>" not in text and matplotlib.__version__ not in text


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def on(page: str, colour: str, alpha: float) -> str:
    """What a half-transparent colour looks like on a page."""
    mixed = (alpha * int(colour[i : i + 2], 16) + (1 - alpha) * int(page[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def test_contrast_by_hand():
    """A slip in the formula, which the next test stands on: black on white is 21, #777777 on white 4.48."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_colours_can_be_read_on_both_pages():
    """A colour that is too pale for white, too dark for GitHub's dark page, or lost in the healthy range."""
    for page in ("#ffffff", "#0d1117"):
        for colour in (*COLOURS.values(), TEXT, HEALTHY):
            assert contrast(colour, page) >= 3, f"{colour} on {page}"
        for colour in {line(i)["color"] for i in range(20)}:
            assert contrast(colour, on(page, HEALTHY, HEALTHY_ALPHA)) >= 3, f"{colour} in the range on {page}"


def test_the_svgs_have_no_colour_of_their_own_and_no_ground(tmp_path):
    """Something that keeps matplotlib's black or white: invisible on one page. Text as outlines: large, and not
    found by a search."""
    with style():
        for name, figure in drawings().items():
            save(figure, tmp_path / f"{name}.svg")
    assert len(list(tmp_path.iterdir())) == len(FIGURES) + 1
    for path in tmp_path.iterdir():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", text)) <= {*COLOURS.values(), TEXT, HEALTHY}, path
        assert not re.findall(r"(?:fill|stroke): (?!#|none|url)(?!opacity)\w+", text), path
        assert not [t for t in re.findall(r"<text [^>]*>", text) if "fill: #" not in t], path  # it would be black
    assert "explained variance</text>" in (tmp_path / "ppo_curves.svg").read_text(encoding="utf-8")


def test_nothing_is_written_over_something_else():
    """A long title over the limits beside it, a legend over its title: what a wider panel or a shorter word mends."""
    with style():
        for name, figure in drawings().items():
            ticks = {id(label) for axes in figure.axes for label in tick_labels(axes)}
            texts = [t for t in figure.findobj(Text) if t.get_text() and id(t) not in ticks]
            boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts]
            for i, (text, box) in enumerate(boxes):
                over = [other for other, its in boxes[i + 1 :] if box.overlaps(its)]
                assert not over, f"{name}: {text} and {over}"
                assert box.x0 > 0 and box.x1 < figure.bbox.width, f"{name}: {text} sticks out"


def tick_labels(axes) -> list[Text]:
    """matplotlib lays them out itself, and keeps those that it doesn't draw at odd places."""
    ticks = [tick for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_major_ticks()]
    return [label for tick in ticks for label in (tick.label1, tick.label2)]


def test_a_figure_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A disk that is full in the middle of writing, and half a figure in the place of yesterday's."""
    out = tmp_path / "figure.svg"
    out.write_text("yesterday's", encoding="utf-8")

    def half(self, file, **kwargs):
        Path(file).write_text("<svg", encoding="utf-8")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(UserError, match=r"figure.svg: can't be written \(No space left"):
        save(Figure(), out)
    assert out.read_text(encoding="utf-8") == "yesterday's"


def test_the_command_draws_every_picture_of_the_documents(tmp_path):
    """A picture that README or a page shows, and no command draws. The curves of another run than the one that was
    named."""
    run = tmp_path / "ppo"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    figures.run(figures.Config(str(ROOT / "study" / "results.json"), str(tmp_path / "assets"), str(run)))
    drawn = {path.name for path in (tmp_path / "assets").iterdir()}
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert drawn == {name for page in pages for name in re.findall(r"assets/(\w+\.svg)", page.read_text("utf-8"))}
