"""How the figures look: one set of colours and line styles on a transparent ground. They can be read on GitHub's white
page and on its dark one.

    with style():
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(x, y, **line(0), label="ppo")
    save(figure, "out/figure.svg")
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from data.files import replacing

# The colours are neither light nor dark: each has a contrast of at least 3 to 1 with either page (WCAG's limit for
# graphics and large text), which leaves no room for shades. In print without colour the line styles differ.
COLOURS = {
    "blue": "#1f83d6",
    "orange": "#cf6a12",
    "pink": "#c8559f",
    "olive": "#8f8010",
    "violet": "#8a6fe0",
    "green": "#1a9160",  # the colour of healthy ranges, so no line of a run is green
}
DASHES = ("solid", (0, (5, 2)), (0, (1, 1)), (0, (6, 1.6, 1.2, 1.6)))
TEXT = "#7a828c"
HEALTHY = COLOURS["green"]
HEALTHY_ALPHA = 0.16  # faint, so that lines on it keep their contrast

SETTINGS = Path(__file__).with_name("figures.mplstyle")


def style() -> contextlib.AbstractContextManager:
    """A context in which matplotlib has its defaults and SETTINGS, whatever the user's own matplotlibrc says."""
    return matplotlib.style.context(SETTINGS, after_reset=True)


def line(number: int) -> dict:
    """Colour and line style of run number 0, 1, ... in a figure. The first 20 differ, and without colour any four in a
    row."""
    colours = [colour for colour in COLOURS.values() if colour != HEALTHY]
    return {"color": colours[number % len(colours)], "linestyle": DASHES[number % len(DASHES)]}


def save(figure: Figure, path: str | Path) -> None:
    """Write the figure as .svg. The file says neither when nor with which version it was made: the same data gives the
    same bytes."""
    with style(), replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
