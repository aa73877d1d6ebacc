"""Several benchmarks side by side: the table that is printed, and its forms for papers and spreadsheets."""

from __future__ import annotations

import csv
import io
from typing import Any

import attrs
import made_results
import pytest
from rich.console import Console
from rich.theme import Theme

from speculators.bench.comparison import BenchComparison, ComparedSpeculator, compare_benches
from speculators.bench.paired import PairedDifference
from speculators.bench.result import BaselineRow, Setting
from speculators.report.bench_compare import comparison_tables
from speculators.report.bench_export import to_csv, to_latex, to_markdown
from speculators.report.conclusion import comparison_line
from speculators.report.console import STYLES


def measured(tau: float, k: int, **changes: Any) -> Setting:
    rates = tuple(0.99 * 0.9**position for position in range(k))
    exact = made_results.acceptance(tau, by_position=rates, by_position_interval=tuple((x, x) for x in rates))
    by_prompt = {str(index): (tau * (20 + index), 20.0 + index) for index in range(20)}
    values = {"exact": exact, "by_prompt": by_prompt, "num_speculative_tokens": k}
    return made_results.setting(**(values | changes))


def compared(*names: str, ks: tuple[int, ...] = (3, 5), **changes: Any) -> BenchComparison:
    """Compares speculators whose taus are 2.0, 2.1, ...; the last three attributes can be changed for all."""
    return compare_benches(
        [
            ComparedSpeculator(
                name=name,
                verifier="v",
                template="",
                results=(made_results.bench_result(*(measured(2 + index / 10, k, **changes) for k in ks)),),
            )
            for index, name in enumerate(names)
        ]
    )


def printed(comparison: BenchComparison, width: int = 80, **more: bool) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, width=width, theme=Theme(STYLES))
    console.print(comparison_tables(comparison, **more), crop=False)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def rows_of(lines: list[str], name: str) -> list[str]:
    return [line for line in lines if line.strip().startswith(name)]


def test_a_row_is_one_line_of_80_columns_with_tau_positions_and_speed_up() -> None:
    """The names of runs are long; nothing is cut or broken."""
    first, second = "quickstart_dspark-7923a923", "quickstart_peagle-015e88c1"
    lines = printed(compared(first, second, "quickstart_medusa-3e25c496"))
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    rows = [row.split() for row in rows_of(lines, first)]
    assert rows[1] == [first, "5", "2.000", "(1.80", "to", "2.20)", "99", "89", "80", "72", "65", "1.25x"]
    (difference,) = [row.split() for row in rows_of(lines, second)[2:]]
    assert difference[0] == second
    assert difference[1].startswith("+0.100")
    assert difference[-1] == "prompts"


@pytest.mark.parametrize("k", [8, 16])
def test_positions_that_80_columns_cannot_show_are_in_the_wide_table(k: int) -> None:
    """The header says how many are shown."""
    comparison = compared("quickstart_dspark", "quickstart_mtp", ks=(k,))
    lines = printed(comparison)
    assert max(map(len, lines)) <= 80
    assert len(rows_of(lines, "quickstart_dspark")) == 1
    assert any("first 8 drafts, %" in line for line in lines) is (k > 8)
    (wide, *_) = rows_of(printed(comparison, wide=True), "quickstart_dspark")
    assert f"{0.99 * 0.9 ** (k - 1):.2f} " in wide


def test_what_cannot_be_compared_says_why() -> None:
    """In the table briefly, with the reason below."""
    comparison = compared("one", "other")
    (one, other) = comparison.speculators
    lines = printed(compare_benches([one, attrs.evolve(other, template="t")]))
    assert rows_of(lines, "other")[2].split() == ["other", "not", "compared"]
    assert "other: not compared: another chat template" in lines


def test_a_disagreement_and_a_busy_machine_are_said() -> None:
    """They stand beside the numbers that they spoil."""
    (one,) = compared("one", live=made_results.live(gap="prompt 3")).speculators
    busy = attrs.evolve(one, results=(attrs.evolve(one.results[0], others=1.5),))
    text = "\n".join(printed(compare_benches([busy])))
    assert "one, K=3: live and replay disagree: prompt 3" in text
    assert "one: other processes used 1.5 CPUs meanwhile" in text


def test_a_baseline_is_timed_and_printed_at_the_largest_k_alone() -> None:
    """Below the speculator beside which it was measured; CSV has every K."""
    ngram = BaselineRow(name="ngram", acceptance=made_results.acceptance(1.5))
    comparison = compared("one", baselines=(ngram,))
    assert [row.split()[1] for row in rows_of(printed(comparison), "ngram") if "to" in row] == ["5"]
    assert [row["K"] for row in csv.DictReader(io.StringIO(to_csv(comparison))) if row["baseline"]] == ["3", "5"]


def test_csv_has_unrounded_numbers_with_their_intervals() -> None:
    """A column for each number; what a row lacks is empty."""
    comparison = compared("one", "other")
    rows = list(csv.DictReader(io.StringIO(to_csv(comparison))))
    assert [(row["speculator"], row["K"]) for row in rows] == [
        ("one", "3"),
        ("one", "5"),
        ("other", "3"),
        ("other", "5"),
    ]
    first, last = rows[0], rows[-1]
    assert float(last["tau"]) == 2.1
    assert (first["difference"], first["compared_with"], first["accepted_5"]) == ("", "", "")
    difference = comparison.rows[-1].difference
    assert difference is not None
    assert float(last["difference_low"]) == difference.low
    assert (last["compared_with"], last["difference_shown"]) == ("one", "yes")
    assert float(last["accepted_5"]) == float(last["accepted_5_high"]) == 0.99 * 0.9**4
    assert first["definition"] == "tau is"


def test_markdown_has_a_row_for_each_setting_and_the_definition() -> None:
    """A bar in a name does not end its cell."""
    lines = to_markdown(compared("one|two", "other")).splitlines()
    assert lines[0].startswith(
        "| suite | T | drafts | K | tau (95%) | accepted by position | speed-up | difference from "
    )
    assert lines[2].startswith(r"| mine | 0 | one\|two | 3 | 2.000 (1.80 to 2.20) | 0.99 0.89 0.80 | 1.25 |  |")
    assert lines[4].rstrip(" |").endswith("| +0.100 (+0.10 to +0.10)")
    assert lines[-1] == "tau is."


def test_latex_escapes_what_it_would_read_otherwise() -> None:
    """Underscores and per cent signs; every row ends, and has as many cells as the header."""
    text = to_latex(compared("quickstart_mtp"))
    assert r"quickstart\_mtp & 5 & 2.000 (1.80 to 2.20)" in text
    assert r"tau (95\%)" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 3
    assert {line.count(" & ") for line in body} == {6}
    assert text.startswith("% tau is\n\\begin{tabular}{lrlrrlr}\n")


@pytest.mark.parametrize(
    ("low", "high", "line"),
    [
        (0.3, 0.47, "+0.385 (95% +0.30 to +0.47) over ngram at K=5; 1,200 prompts would show 2%"),
        (-0.47, -0.3, "-0.385 (95% -0.47 to -0.30) against ngram at K=5; 1,200 prompts would show 2%"),
        (-0.1, 0.2, "no difference from ngram shown at K=5 (95% -0.10 to +0.20); 1,200 prompts would show 2%"),
    ],
)
def test_the_difference_from_a_baseline_is_a_sentence(low: float, high: float, line: str) -> None:
    """It says so where none was shown."""
    difference = PairedDifference(mean=(low + high) / 2, low=low, high=high, prompts=20, prompts_for_share=1200)
    assert comparison_line(difference, "ngram", 5) == line
