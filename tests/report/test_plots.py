"""Plots that stand alone, as files beside a table."""

from __future__ import annotations

import re

import pytest

from speculators.report.plots import Series, lines

pytest.importorskip("matplotlib")
CURVE = Series(name="eagle3", x=[1000, 2000, 4000], y=[1.2, 1.4, 1.6], marks=True)


def texts(drawn):
    """Each text of a plot with the x at which it stands."""
    placed = re.findall(r'<text [^>]*?x="([\d.]+)"[^>]*>([^<]*)</text>', drawn)
    return {text: float(x) for x, text in placed}


def test_a_logarithmic_axis_puts_equal_ratios_equally_far_apart_with_a_tick_at_each_point():
    """Twice as many tokens are one step to the right, wherever on the axis."""
    at = texts(lines("tokens", [CURVE], x="tokens", y="tau", logarithmic=True))
    steps = [at["2,000"] - at["1,000"], at["4,000"] - at["2,000"]]
    # Text lies on a grid of a hundredth of a point.
    assert steps[0] == pytest.approx(steps[1], abs=0.1)


def test_a_plot_without_a_legend_beside_it_names_its_lines():
    """The name stands in the plot if asked to, and not otherwise."""
    asked, others = (texts(lines("tokens", [CURVE], x="tokens", y="tau", named=named)) for named in (True, False))
    assert "eagle3" in asked
    assert "eagle3" not in others
