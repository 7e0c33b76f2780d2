"""study/figures.py and style.py: what a figure shows is what was measured, and it can be read on either page."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lib.cli import UserError
from study import figures
from study.figures import FIGURES, ppo_curves
from study.metrics import METRICS
from study.results import read
from study.style import COLOURS, HEALTHY, HEALTHY_ALPHA, TEXT, line, save, style

ROOT = Path(__file__).resolve().parent.parent
CURVES = ("score", "gold", "kl", "entropy", "explained_variance", "clip_fraction")
ROWS = [{"step": 3 * i + 1, **{name: n + 0.01 * i * i for n, name in enumerate(CURVES)}} for i in range(5)]


@functools.cache
def drawings() -> dict[str, Figure]:
    """Every figure of the project, drawn."""
    results = read(str(ROOT / "study" / "results.json"))
    with style():
        made = {name: make(results) for name, make in FIGURES.items()} | {"ppo_curves": ppo_curves(ROWS)}
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


def points_of(axes) -> list[tuple[float, float]]:
    """The points of all lines in the order in which they are drawn."""
    return [tuple(xy) for drawn in axes.lines for xy in drawn.get_xydata()]


def test_the_frontier_has_a_point_for_each_coefficient():
    """KL and gold exchanged, a method left out, points joined in the order of their names."""
    results = read(str(ROOT / "study" / "results.json"))
    (axes,) = figures.frontier(results).axes
    drawn = points_of(axes)
    for method in results["frontier"].values():
        xy = sorted((p["kl"]["mean"], p["gold"]["mean"]) for p in method.values())
        assert any(drawn[i : i + len(xy)] == xy for i in range(len(drawn))), method


def test_the_picture_of_readme_shows_every_seed_and_their_mean():
    """Score and gold exchanged; a run under another's title; the seeds' lines in place of their mean."""
    results = read(str(ROOT / "study" / "results.json"))
    rl, plain = results["overoptimisation"]["rl"], results["secret"]["maximised"]["plain"]
    panels = figures.three_reward_models(results).axes
    for axes, run in zip(panels, (rl["weak_0"], plain, rl["strong_0"]), strict=True):
        for key in ("score", "gold"):
            title = "true reward (mean)" if key == "gold" else "reward model's opinion (mean)"
            (thick,) = (drawn for drawn in axes.lines if drawn.get_label() == title)
            assert thick.get_ydata() == pytest.approx([p[key]["mean"] for p in run["points"]])
            thin = [d.get_ydata() for d in axes.lines if d.get_color() == thick.get_color() and d is not thick]
            seeds = zip(*(p[key]["seeds"] for p in run["points"]), strict=True)
            assert [list(y) for y in thin] == [list(y) for y in seeds]


def test_bars_are_the_intervals():
    """Half a standard error, an interval of one seed, or bars along the wrong axis."""
    wide, single = {"mean": 2.0, "low": 1.5, "high": 2.5}, {"mean": 1.0, "low": None, "high": None}
    for across in (False, True):
        axes = Figure().subplots()
        figures.bars(axes, [10, 20], [wide, single], across=across)
        ((_, _, (bars,)),) = axes.containers
        ends = [[tuple(xy) for xy in segment] for segment in bars.get_segments()]
        upright = [[(10, 1.5), (10, 2.5)], [(20, 1.0), (20, 1.0)]]
        assert ends == [[(y, x) for x, y in pair] for pair in upright] if across else ends == upright


def test_the_first_20_runs_differ_and_four_in_a_row_in_grey_too():
    """Colours and dashes that repeat together: two runs that look the same."""
    looks = [line(i) for i in range(20)]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 20
    for i in range(17):
        assert len({str(look["linestyle"]) for look in looks[i : i + 4]}) == 4


# -------------------------------------------------------------------------------- the file


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
