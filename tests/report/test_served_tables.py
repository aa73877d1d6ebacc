"""The tables of a benchmark on a server, as they are printed."""

from __future__ import annotations

import io

import attrs
import made_results
import pytest
from rich.console import Console
from rich.theme import Theme

from speculators.report.console import STYLES
from speculators.report.served import served_tables


def _printed(*, wide: bool) -> list[str]:
    pace = attrs.evolve(made_results.served_setting().pace, tokens_per_second=10_250.0)
    setting = made_results.served_setting(pace=pace, baseline=pace, speed_up=2.5, unmatched_baseline=True)
    file = io.StringIO()
    tables = served_tables(made_results.served_result(setting), wide=wide)
    Console(file=file, width=80, theme=Theme(STYLES)).print(tables, crop=False)
    return file.getvalue().splitlines()


def test_a_row_of_a_server_is_one_line_of_80_columns() -> None:
    """Suite, K, T, tau with its interval, both speeds and their ratio; what cannot be is called unreliable."""
    lines = _printed(wide=False)
    (row,) = [line for line in lines if line.lstrip().startswith("mine ")]
    assert row.split() == ["mine", "3", "0", "1.900", "(1.80", "to", "2.20)", "10250.0", "10250.0", "2.50x?"]
    assert "mine, K=3, T=0: 2.50x: more than tau allows, timing unreliable (machine busy?)" in lines
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("column", ["accepted by position", "inter-token ms", "rounds"])
def test_wide_adds_the_other_columns(column: str) -> None:
    """Which stand in two tables, wider than the terminal."""
    assert any(column in line for line in _printed(wide=True))
    assert not any(column in line for line in _printed(wide=False))
