"""study/plot.py and style.py: what a figure shows is what was logged, and it can be read on either page."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from lib.cli import UserError
from study import plot
from study.metrics import METRICS, bounded
from study.plot import draw, metrics_of, plot_runs, read_runs
from study.style import COLOURS, HEALTHY, HEALTHY_ALPHA, PAGES, TEXT, line, save, style

ROOT = Path(__file__).resolve().parent.parent


def write_log(folder: Path, rows: list[dict]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def figure_of(*runs: str, metrics=()) -> Figure:
    with style():
        found = read_runs(list(runs))
        figure = draw(found, list(metrics) or metrics_of(found))
        figure.draw_without_rendering()
    return figure


def panel(figure: Figure, title: str):
    found = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    assert len(found) == 1, f"{len(found)} panels are called {title}"
    return found[0]


def points(drawn) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in drawn.get_xydata()]


# -------------------------------------------------------------------------------- what is shown


def test_the_lines_are_what_was_logged(tmp_path):
    """A line that belongs to another metric or run, lacks a point, or is drawn over row numbers and not over steps."""
    logs = {}
    for run, factor in (("ppo", 1.0), ("grpo", -2.0)):
        logs[run] = [{"step": 3 * i + 1, "score": factor * i, "kl": factor + i * i, "own": 7.5 * i} for i in range(5)]
    figure = figure_of(*(write_log(tmp_path / run, rows) for run, rows in logs.items()))
    titles = {"score": "score", "kl": "KL", "own": "own"}  # `own` is a user's metric, which METRICS doesn't know
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(titles.values())
    for name, title in titles.items():
        drawn = panel(figure, title).lines
        assert [points(d) for d in drawn] == [[(row["step"], row[name]) for row in rows] for rows in logs.values()]
        assert len({d.get_color() for d in drawn}) == len({d.get_linestyle() for d in drawn}) == 2
    (legend,) = figure.legends
    entries = dict(zip((t.get_text() for t in legend.get_texts()), legend.get_lines(), strict=False))
    for (name, entry), drawn in zip(entries.items(), panel(figure, "KL").lines, strict=False):
        assert name in logs and entry.get_color() == drawn.get_color()


def test_what_is_no_number_is_skipped(tmp_path):
    """A nan or null that is drawn as 0, breaks the limits of the axes or drops the row's other figures; false that is
    no 0."""
    rows = [
        {"step": 1, "score": 1.0, "kl": None, "stopped_early": False, "note": "x"},
        {"step": 2, "score": math.nan, "kl": 2.0, "stopped_early": True, "note": "x"},
        {"step": 3, "score": 3.0, "kl": math.inf, "stopped_early": False, "note": "x"},
    ]
    figure = figure_of(write_log(tmp_path / "ppo", rows))
    assert points(panel(figure, "score").lines[0]) == [(1, 1), (3, 3)]
    assert points(panel(figure, "KL").lines[0]) == [(2, 2)]
    assert panel(figure, "KL").lines[0].get_marker() == "o"  # a line of one point would not be seen
    assert points(panel(figure, "stopped early").lines[0]) == [(1, 0), (2, 1), (3, 0)]
    assert len(figure.axes) == 3  # none for the note
    assert all(math.isfinite(v) for axes in figure.axes for v in axes.get_ylim())


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if bounded(metric)])
def test_the_healthy_range_is_that_of_METRICS(tmp_path, name):
    """A band of other limits, or cut to what is seen of it; data, or the limit that they violate, out of sight."""
    low, high = METRICS[name].low, METRICS[name].high
    for number, (start, end) in enumerate(((-5, -4), (-0.5, 0.1), (0.4, 0.6), (0, 1), (0.99, 1.01), (4, 5), (1, 1))):
        values = [low + start * (high - low), low + end * (high - low)]
        rows = [{"step": i, name: value} for i, value in enumerate(values)]
        axes = panel(figure_of(write_log(tmp_path / f"{number}", rows)), METRICS[name].title)
        bottom, top = axes.get_ylim()
        (band,) = axes.patches
        assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((low, high), abs=1e-12)
        assert to_hex(band.get_facecolor()) == HEALTHY
        assert bottom < values[0] and values[1] < top
        assert low < top and high > bottom, "nothing of the range is seen"
        assert [float(n) for n in re.findall(r"-?[\d.]+", axes.get_title(loc="right"))] == [low, high]


def test_no_range_no_band(tmp_path):
    """A band, or its numbers, in the panel of a metric whose healthy range depends on the task."""
    axes = panel(
        figure_of(write_log(tmp_path / "ppo", [{"step": 1, "score": 1.0}, {"step": 2, "score": 2.0}])), "score"
    )
    assert not axes.patches and axes.get_title(loc="right") == ""
    assert axes.get_ylabel() == METRICS["score"].unit == "reward" and axes.get_xlabel() == "step"


def test_a_small_value_is_not_pressed_flat(tmp_path):
    """The whole range shown always: a KL of 1 under a limit of 15 would be a flat line. A constant far from 1 on an
    axis from -1 to 1."""
    run = write_log(tmp_path / "ppo", [{"step": i, "score": 0, "kl": i / 20, "lr": 2e-4} for i in range(21)])
    figure = figure_of(run)
    bottom, top = panel(figure, "KL").get_ylim()
    assert 1 / (top - bottom) > 0.15
    bottom, top = panel(figure, "learning rate").get_ylim()
    assert 0 <= bottom < 2e-4 < top < 1e-3


# -------------------------------------------------------------------------------- several runs


SFT = {"loss": 1.0, "held_out_loss": 2.0}
PPO, DPO = {"score": 1.0, "kl": 2.0}, {"loss": 0.5, "accuracy": 0.8, "margin": 1.0}


def test_a_folder_stands_for_all_runs_below_it(tmp_path):
    """A run that is left out, or its line in the panel of a metric that it doesn't log."""
    for name, figures in {"ppo": PPO, "dpo": DPO, "deep/er/grpo": PPO}.items():
        write_log(tmp_path / "out" / name, [{"step": 1, **figures}, {"step": 2, **figures}])
    figure = figure_of(str(tmp_path / "out"))
    assert [text.get_text() for text in figure.legends[0].get_texts()][:3] == ["deep/er/grpo", "dpo", "ppo"]
    titles = {"score": 2, "KL": 2, "training loss": 1, "accuracy": 1, "margin": 1}
    assert {axes.get_title(loc="left"): len(axes.lines) for axes in figure.axes} == titles


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    """Three runs that are all called ppo in the legend; a path of this machine in a figure that is published."""
    for name in ("1/ppo", "2/ppo", "2/deep/er/ppo"):
        write_log(tmp_path / name, [{"step": 1, **PPO}])
    runs = read_runs([str(tmp_path / "2"), str(tmp_path / "1" / "ppo"), str(tmp_path / "1")])
    assert list(runs) == ["2/deep/er/ppo", "2/ppo", "1/ppo"]  # the last was named twice
    assert list(read_runs([str(tmp_path / "1" / "ppo")])) == ["ppo"]
    out = tmp_path / "figure.svg"
    plot_runs([str(tmp_path)], out)
    assert str(tmp_path) not in out.read_text(encoding="utf-8") and "2/deep/er/ppo" in out.read_text(encoding="utf-8")


def test_the_first_20_runs_differ_and_four_in_a_row_in_grey_too():
    """Colours and dashes that repeat together: two runs that look the same."""
    looks = [line(i) for i in range(20)]
    assert len({(look["color"], str(look["linestyle"])) for look in looks}) == 20
    for i in range(17):
        assert len({str(look["linestyle"]) for look in looks[i : i + 4]}) == 4


def test_chosen_metrics_keep_their_order(tmp_path):
    """--metrics that only filters: the figure of the documentation has its own order."""
    runs = [write_log(tmp_path / "ppo", [{"step": 1, **PPO}]), write_log(tmp_path / "sft", [{"step": 1, **SFT}])]
    figure = figure_of(*runs, metrics=["kl", "score"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["KL", "score"]


# -------------------------------------------------------------------------------- the file


def everything(folder: Path) -> str:
    """Two runs that log all of METRICS, and one that logs little: the most crowded figure."""
    rows = [{"step": i, **{name: 0.1 * i + 0.01 * n for n, name in enumerate(METRICS)}} for i in range(1, 6)]
    for name in ("ppo", "a_run_with_a_rather_long_name"):
        write_log(folder / name, rows)
    write_log(folder / "sft", [{"step": i, **SFT} for i in range(3)])
    return str(folder)


def test_a_rerun_gives_the_same_bytes(tmp_path, monkeypatch):
    """A date, a random id or the reader's own settings in the file: every rerun would be a change to commit."""
    run = everything(tmp_path / "out")
    for suffix in (".svg", ".png", ".pdf"):
        files = []
        for number, colour in enumerate(("red", "blue")):
            monkeypatch.setenv("SOURCE_DATE_EPOCH", str(10**9 * number))
            monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", colour)
            monkeypatch.setitem(matplotlib.rcParams, "xtick.major.size", 7.0 + number)
            files.append(tmp_path / f"{number}{suffix}")
            plot_runs([run], files[-1], ["score", "kl"])
            assert matplotlib.rcParams["axes.facecolor"] == colour  # and they are the reader's again
        assert files[0].read_bytes() == files[1].read_bytes()
        assert files[0].read_bytes()[:4] in (b"<?xm", b"\x89PNG", b"%PDF")
    text = (tmp_path / "0.svg").read_text(encoding="utf-8")
    assert "date>" not in text and matplotlib.__version__ not in text


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
    for page in PAGES.values():
        for colour in (*COLOURS.values(), TEXT, HEALTHY):
            assert contrast(colour, page) >= 3, f"{colour} on {page}"
        for colour in {line(i)["color"] for i in range(20)}:
            assert contrast(colour, on(page, HEALTHY, HEALTHY_ALPHA)) >= 3, f"{colour} in the range on {page}"


def test_the_svg_has_no_colour_of_its_own_and_no_ground(tmp_path):
    """Something that keeps matplotlib's black or white: invisible on one page. Text as outlines: large, and not
    found by a search."""
    out = tmp_path / "all.svg"
    plot_runs([everything(tmp_path / "out")], out)
    text = out.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", text)) <= {*COLOURS.values(), TEXT, HEALTHY}
    assert not re.findall(r"(?:fill|stroke): (?!#|none|url)(?!opacity)\w+", text)
    shown = re.findall(r"<text [^>]*>([^<]+)</text>", text)
    assert {"a_run_with_a_rather_long_name", "explained variance", "0.5 to 15"} <= set(shown)
    default = [t for t in re.findall(r"<text [^>]*>", text) if "fill: #" not in t]
    assert not default  # text without a fill is black


def test_nothing_is_written_over_something_else(tmp_path):
    """A long title over the limits beside it, a legend over its title: what a wider panel or a shorter word mends."""
    with style():
        runs = read_runs([everything(tmp_path)])
        figure = draw(runs, metrics_of(runs))
        FigureCanvasAgg(figure).draw()
        ticks = {id(label) for axes in figure.axes for label in tick_labels(axes)}
        texts = [t for t in figure.findobj(Text) if t.get_text() and id(t) not in ticks]
        boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts]
    assert len(boxes) > 2 * len(METRICS)
    for i, (text, box) in enumerate(boxes):
        over = [other for other, its in boxes[i + 1 :] if box.overlaps(its)]
        assert not over, f"{text} and {over}"
        assert box.x0 > 0 and box.x1 < figure.bbox.width, f"{text} sticks out"


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


# -------------------------------------------------------------------------------- the command


def start(monkeypatch, *argv: str) -> int:
    """python -m study.plot ARGV -> exit status"""
    monkeypatch.setattr(sys, "argv", ["study/plot.py", *argv])
    try:
        plot.main()
    except SystemExit as end:
        return end.code
    return 0


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    """A traceback, or a figure without anything in it, where the user named something wrong."""
    monkeypatch.chdir(tmp_path)
    write_log(Path("ppo"), [{"step": 1, **PPO}])
    write_log(Path("empty"), [])
    write_log(Path("nothing"), [{"step": 1, "score": None}])
    write_log(Path("stepless"), [{"step": 1, **PPO}, PPO])
    write_log(Path("broken"), [])
    Path("broken/metrics.jsonl").write_text('{"step": 1, "score": 1}\n{"step": 2, "sc', encoding="utf-8")
    Path("bare").mkdir()
    Path("file").write_text("", encoding="utf-8")
    cases = (
        (["no_such"], "no_such: no such folder"),
        (["file"], "file: no such folder"),
        (["bare"], "bare: no metrics.jsonl in it or below it"),
        (["empty"], "nothing was logged yet"),
        (["nothing"], "nothing was logged yet"),
        (["stepless"], 'metrics.jsonl:2: no "step"'),
        (["broken"], "metrics.jsonl:2: not valid JSON"),
        (["ppo", "--metrics", "kl", "kll"], "--metrics kll: not logged by these runs, which log score, kl"),
        (["ppo", "--out", "figure.jpg"], "figure.jpg: a figure's name ends in .svg, .png, .pdf"),
        (["ppo", "--out", "file/figure.svg"], "file: can't be made a folder"),
    )
    for argv, message in cases:
        assert start(monkeypatch, *argv) == 2, argv
        printed = capsys.readouterr().err
        assert printed.startswith("plot.py: error: ") and printed.count("\n") == 1, printed
        assert message in printed.replace(os.sep, "/"), printed
        assert not [*tmp_path.rglob("*.svg"), *tmp_path.rglob("*.tmp")], argv


def test_the_default_figure_lies_in_the_first_folder(tmp_path, monkeypatch, capsys):
    """Flags before or after the runs, or none: another place than the one that --help names."""
    monkeypatch.chdir(tmp_path)
    for name in ("ppo", "grpo"):
        write_log(Path("out") / name, [{"step": 1, **PPO}])
    assert start(monkeypatch, "out/grpo", "out/ppo", "--metrics", "kl") == 0
    assert start(monkeypatch, "out") == 0
    assert start(monkeypatch, "--out", "deep/er/one.svg", "out/ppo") == 0
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.svg")) == [
        "deep/er/one.svg",
        "out/curves.svg",
        "out/grpo/curves.svg",
    ]
    assert "2 runs, 1 metric" in capsys.readouterr().out


def test_it_starts_as_a_module(tmp_path):
    run = write_log(tmp_path / "ppo", [{"step": 1, **PPO}])
    subprocess.run([sys.executable, "-m", "study.plot", run], cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "ppo" / "curves.svg").exists()
