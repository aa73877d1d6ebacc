"""The acceptance tables of a benchmark, as they are printed."""

from __future__ import annotations

import io

import attrs
import pytest
from fake_run import setting
from made_results import bench_result, tokens_up_to
from rich.console import Console
from rich.theme import Theme

from speculators.bench.referee import Agreement
from speculators.bench.result import BenchResult, Setting
from speculators.report.bench import bench_tables
from speculators.report.console import STYLES


def _printed(settings: list[Setting], width: int = 80, **more: bool) -> str:
    result = BenchResult(
        speculator="run", verifier="tiny", device="cpu", threads=1, dtype="float32", seed=0, max_new_tokens=9,
        settings=tuple(settings),
    )  # fmt: skip
    file = io.StringIO()
    Console(file=file, width=width, theme=Theme(STYLES)).print(bench_tables(result, **more), crop=False)
    return file.getvalue()


def test_a_baseline_has_its_row_at_the_largest_k() -> None:
    """It was decoded there alone; in which order the K were asked for does not matter."""
    large, small = (setting("held", k, 0.0, 0.6) for k in (5, 3))
    small = attrs.evolve(small, baselines=(attrs.evolve(small.baselines[0], live_tau=None, speed=None),))
    (row,) = [line for line in _printed([large, small]).splitlines() if line.lstrip().startswith("ngram")]
    assert row.split()[1] == "5"
    assert f"{large.baselines[0].speed.speed_up:.2f}x" in row


@pytest.mark.parametrize(("others", "is_said"), [(None, False), (0.1, False), (0.9, True)])
def test_a_busy_machine_is_said_beside_the_times(others: float | None, is_said: bool) -> None:
    """Milliseconds that other processes lengthened must not pass for those of an idle machine."""
    file = io.StringIO()
    result = bench_result(setting("held", 3, 0.0, 0.6), others=others)
    Console(file=file, width=80, theme=Theme(STYLES)).print(bench_tables(result), crop=False)
    assert ("other processes used 0.9 CPUs meanwhile" in file.getvalue()) is is_said


@pytest.mark.parametrize(
    ("interval", "gap", "untold", "mark"),
    [
        ((1.0, 9.0), "", "", "agrees"),
        ((1.0, 9.0), "", "the other criterion", "agrees"),
        (None, "", "too few", "too few prompts"),
        ((8.0, 9.0), "it is 2", "", "DISAGREES"),
    ],
)
def test_the_verdict_stands_beside_lives_number(interval, gap, untold, mark) -> None:
    """What nothing could be said of is not called an agreement."""
    one = setting("held", 3, 0.0, 0.6)
    agreement = Agreement(criterion="", predicted_tau=1.0, interval=interval, gap=gap, untold=untold)
    one = attrs.evolve(one, live=attrs.evolve(one.live, agreement=agreement))
    assert f"{one.live.acceptance.tau:.3f} {mark} " in _printed([one])


def test_every_row_is_one_line_of_80_columns() -> None:
    """Drafts, K, tau with its interval, live and speed-up: no number is cut or broken, whatever else is long."""
    settings = [setting("held", k, 0.0, 0.6) for k in (3, 5, 10)]
    live = settings[2].live
    doubtful = attrs.evolve(live, speed=attrs.evolve(live.speed, speed_up=11.95, unmatched_baseline=True))
    untold = Agreement(criterion="", predicted_tau=1.0, untold="few")
    settings[2] = attrs.evolve(settings[2], live=attrs.evolve(doubtful, agreement=untold))
    text = _printed(settings)
    rows = text.splitlines()[text.splitlines().index(next(line for line in text.splitlines() if "drafts" in line)) :]
    assert rows[0].split() == ["drafts", "K", "tau", "(95%)", "live", "speed-up"]
    for row, each in zip(rows[1:4], settings, strict=True):
        low, high = each.exact.tau_interval
        cells = ["speculator", str(each.num_speculative_tokens), f"{each.exact.tau:.3f}", f"({low:.2f}", "to"]
        assert row.split()[:6] == [*cells, f"{high:.2f})"]
    assert rows[3].split()[6:] == [f"{live.acceptance.tau:.3f}", "too", "few", "prompts", "11.95x?"]
    assert rows[5].split() == ["plain", "1.000", "1.00x"]
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_wide_has_every_column_in_one_line_even_on_a_narrow_terminal() -> None:
    """The terminal breaks the line, so that nothing is lost; a long name of a baseline is no exception."""
    one = setting("held", 7, 0.0, 0.6)
    baseline = attrs.evolve(one.baselines[0], name="draft_model:" + "x" * 60)
    lines = _printed([attrs.evolve(one, baselines=(baseline,))], wide=True).splitlines()
    (row,) = [line for line in lines if line.lstrip().startswith("speculator")]
    for number in ("0.60 0.36 0.22 0.13 0.08 0.05 0.03", "7.00", "14.0 + 25.0", f"{one.live.speed.speculative:.1f}"):
        assert number in row
    assert any(baseline.name in line for line in lines)


def test_the_categories_are_rows_and_each_k_has_a_column() -> None:
    """Tau of every K by category in one table a suite and temperature; positions of the largest K."""
    settings = [setting("held", k, 0.0, 0.6) for k in (3, 7, 5)]
    lines = _printed(settings, wide=True).splitlines()
    head = next(place for place, line in enumerate(lines) if line.strip() == "by category") + 1
    columns = ("category", "prompts", "tau K=3", "tau K=5", "tau K=7 (95%)", "accepted by position, K=7")
    assert [lines[head].index(name) for name in columns] == sorted(lines[head].index(name) for name in columns)
    for place, (name, acceptance) in enumerate(settings[1].by_category.items()):
        row = lines[head + 1 + place].split()
        assert row[0] == name
        assert row[2:4] == [f"{settings[index].by_category[name].tau:.3f}" for index in (0, 2)]
        assert row[4] == f"{acceptance.tau:.3f}"
        assert len(row) == 5 + 3 + 7


def test_details_show_where_rounds_begin_with_tau_of_each_k() -> None:
    """One line a range of known tokens, with prompts and tokens of the largest K; a range that a K lacks is a dash."""
    settings = [
        attrs.evolve(
            setting("held", k, 0.0, 0.6),
            by_context=tuple(tokens_up_to(edge, tau=1 + k / 10) for edge in edges),
            by_place=(tokens_up_to(64, tau=2.5),),
        )
        for k, edges in ((7, (128, 8192)), (3, (128,)))
    ]
    text = _printed(settings, details=True)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    start = lines.index("by tokens known when a round begins")
    assert lines[start + 1] == "known prompts tokens tau K=3 tau K=7 (95%)"
    assert lines[start + 2] == "65 to 128 1 17 1.300 1.700 (1.70 to 1.70)"
    assert lines[start + 3] == "4,097 to 8,192 1 17 - 1.700 (1.70 to 1.70)"
    assert "by tokens of the answer known then" in lines
    assert max(map(len, text.splitlines())) <= 80
    assert "known" not in _printed(settings)
