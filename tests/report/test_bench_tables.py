"""The acceptance tables of a benchmark, as they are printed."""

from __future__ import annotations

import io

from fake_run import setting
from rich.console import Console
from rich.theme import Theme

from speculators.bench.result import BenchResult
from speculators.report.bench import bench_tables
from speculators.report.console import STYLES


def test_the_categories_are_rows_and_each_k_has_a_column() -> None:
    """Tau of every K by category in one table a suite and temperature, within 120 columns; positions of the largest."""
    settings = [setting("held", k, 0.0, 0.6) for k in (3, 7, 5)]
    result = BenchResult(
        speculator="run", verifier="tiny", device="cpu", threads=1, dtype="float32", seed=0, max_new_tokens=9,
        settings=tuple(settings),
    )  # fmt: skip
    file = io.StringIO()
    Console(file=file, width=120, theme=Theme(STYLES)).print(bench_tables(result.to_json()))
    lines = file.getvalue().splitlines()
    head = next(place for place, line in enumerate(lines) if line.strip() == "by category") + 1
    columns = ("category", "prompts", "tau K=3", "tau K=5", "tau K=7 (95%)", "accepted by position, K=7")
    assert [lines[head].index(name) for name in columns] == sorted(lines[head].index(name) for name in columns)
    for place, (name, held) in enumerate(settings[1].by_category.items()):
        row = lines[head + 1 + place].split()
        assert row[0] == name
        assert row[2:4] == [f"{settings[index].by_category[name].tau:.3f}" for index in (0, 2)]
        assert row[4] == f"{held.tau:.3f}"
        assert len(row) == 5 + 3 + 7
