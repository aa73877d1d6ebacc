"""Plots as inline SVG. Text stays text, and colours are variables of the page: one plot serves light and dark."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import attrs

from speculators.errors import SpeculatorsError
from speculators.report.sheet import SHEET

# Stand-ins for the page's colours: matplotlib accepts only real colours, so its output is searched for these.
COLOURS, BASELINE_COLOURS = 8, 3
_SERIES = {
    **{f"s{index}": f"#c0de{index:02d}" for index in range(COLOURS)},
    **{f"b{index}": f"#c0deb{index}" for index in range(BASELINE_COLOURS)},
}
_INK, _MUTED, _GRID = "#c0deff", "#c0deee", "#c0dedd"
_VARIABLES = {
    **{code: f"var(--{name})" for name, code in _SERIES.items()},
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--grid)",
}
_LINES: dict[str, Any] = {"solid": "-", "dashed": (0, (4, 2)), "dotted": (0, (1, 1.5))}
# Inches (72 points each), about the width of a phone: text is neither shrunk there nor enlarged elsewhere.
WIDTH, HEIGHT = 4.2, 2.75
# Characters of a category's name in one line.
LABEL_WIDTH = 22
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same text widths on every machine
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


@attrs.frozen(kw_only=True)
class Series:
    """One line of a plot, or one column of dots.

    Attributes:
        y: a value for each x; a NaN is not drawn.
        intervals: (low, high) around each y; () for none.
        colour: variable of the page's style sheet, from `run_colour` or `baseline_colour`.
        line: "solid", "dashed" or "dotted".
        marks: whether to draw a dot at each point, hollow unless the line is solid.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float]] = ()
    colour: str = "s0"
    line: str = "solid"
    marks: bool = False


def check_matplotlib() -> None:
    """Raises SpeculatorsError if the plotting library is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        hint = "pip install 'spec-recipes[report]' (spec diff and spec bench print their numbers without it)"
        raise SpeculatorsError("the report's plots need matplotlib, which is not installed", hint=hint)


def run_colour(index: int) -> str:
    """Names the colour of a run; they repeat after COLOURS."""
    return f"s{index % COLOURS}"


def baseline_colour(index: int) -> str:
    """Names the colour of a baseline, which no run has."""
    return f"b{index % BASELINE_COLOURS}"


def lines(
    name: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    at_points: bool = False,
    logarithmic: bool = False,
    named: bool = False,
    from_zero: bool = False,
    level: float | None = None,
) -> str:
    """Draws lines over whole numbers as SVG.

    Args:
        name: of the plot, unique on its page.
        x, y: labels of the axes.
        at_points: whether the ticks of the x axis are the x of the series, as for K.
        logarithmic: whether the x axis is logarithmic, as for amounts of data.
        named: whether to write each line's name at its last point, for a plot without a legend beside it.
        from_zero: whether the y axis begins at 0, as for probabilities.
        level: y of a line across, such as a speed-up of 1.
    """
    from matplotlib.ticker import MaxNLocator

    with _style(name):
        figure, axes = _figure(HEIGHT)
        for one in series:
            colour = _SERIES[one.colour]
            at, values, errors = _finite(one)
            mark = {"marker": "o" if one.marks else None, "fillstyle": "full" if one.line == "solid" else "none"}
            axes.plot(at, values, color=colour, linestyle=_LINES[one.line], **mark)
            if one.intervals:
                axes.errorbar(at, values, errors, color=colour, capsize=3, elinewidth=1, fmt="none")
            if named and at:
                axes.annotate(
                    one.name, (at[-1], values[-1]), (-6, 6), textcoords="offset points", ha="right", color=colour
                )
        if level is not None:
            axes.axhline(level, color=_MUTED, linewidth=0.8, linestyle=":")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        places = sorted({place for one in series for place in one.x})
        if logarithmic:
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xticks(places, [f"{place:,.0f}" for place in places])
        elif at_points:
            axes.set_xticks(places)
            axes.set_xlim(places[0] - 0.3, places[-1] + 0.3)
        if from_zero:
            # Lines that are nearly level leave no margin of their own above them.
            axes.set_ylim(0, 1.08 * max((value for one in series for value in _finite(one)[1]), default=1.0) or 1.0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        return _svg(figure)


def dots(name: str, labels: Sequence[str], series: Sequence[Series], *, x: str, level: float | None = None) -> str:
    """Draws dots with intervals as SVG, a row for each label; `x` of a series holds rows and `y` values.

    Args:
        level: of a line across all rows, such as a difference of 0.
    """
    with _style(name):
        text_lines = max(_whole(label).count("\n") + 1 for label in labels)
        figure, axes = _figure(0.75 + len(labels) * max(0.24, 0.17 * text_lines, 0.11 * (1 + len(series))))
        for index, one in enumerate(series):
            shift = (index - (len(series) - 1) / 2) * 0.7 / max(1, len(series))
            rows, values, errors = _finite(one)
            style = {"color": _SERIES[one.colour], "capsize": 2.5, "elinewidth": 1}
            axes.errorbar(values, [row + shift for row in rows], xerr=errors, fmt="o", **style)
        if level is not None:
            axes.axvline(level, color=_MUTED, linewidth=1.2)
        axes.set_yticks(range(len(labels)), [_whole(label) for label in labels])
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(x)
        return _svg(figure)


def image(drawn: str) -> str:
    """Turns a plot for a page into a file of its own, on paper of its own, in the colours of the light page."""
    colours = dict(re.findall(r"--(\w+): (#\w+);", SHEET.partition("@media")[0]))
    drawn = re.sub(r"var\(--(\w+)\)", lambda variable: colours[variable[1]], drawn)
    # Twice its size on a page, where columns are narrow.
    width = 2 * 72 * WIDTH
    drawn = drawn.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" ', 1)
    paper = f'<rect width="100%" height="100%" fill="{colours["paper"]}"/>'
    return re.sub(r"(<svg [^>]*>)", rf"\1\n {paper}", drawn, count=1) + "\n"


def _finite(one: Series) -> tuple[list[float], list[float], list[list[float]]]:
    """Picks the points that have a value: x, y, and how far the intervals reach below and above."""
    points = []
    for at, value, interval in zip(one.x, one.y, one.intervals or [(math.nan, math.nan)] * len(one.x), strict=True):
        low, high = (value if math.isnan(bound) else bound for bound in interval)
        if not math.isnan(value):
            # Rounding can push a value just outside of an interval without width; matplotlib refuses negative bars.
            points.append((at, value, max(0.0, value - low), max(0.0, high - value)))
    x, y, below, above = (list(column) for column in zip(*points, strict=True)) if points else ([], [], [], [])
    return x, y, [below, above]


@contextmanager
def _style(name: str) -> Iterator[None]:
    """Applies our style alone, whatever the user's own is. Saving lays texts out, so it must happen inside."""
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_STYLE, "svg.hashsalt": name})
        yield


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _whole(text: str) -> str:
    """Breaks a long label into lines of LABEL_WIDTH characters."""
    # A dollar sign would start a formula.
    return "\n".join(textwrap.wrap(text, LABEL_WIDTH) or [text]).replace("$", r"\$")


def _svg(figure: Any) -> str:
    """Writes the figure as an element for a page: no prologue, no metadata, no date, the page's colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    # Its style sheet would apply to the whole page.
    text = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    # Group ids repeat from plot to plot, and ids must be unique on a page. Clip paths are referred to and keep theirs.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = text.replace("xlink:href", "href")
    for code, variable in _VARIABLES.items():
        text = text.replace(code, variable)
    return text
