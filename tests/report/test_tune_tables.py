"""The tables of `spec tune`: predictions beside measurements, the choice, and the schedule for a server."""

from __future__ import annotations

import io
from typing import Any

import attrs
import made_results
from rich.console import Console, RenderableType
from rich.theme import Theme

from speculators.report.console import STYLES
from speculators.report.tune import served_tuning_tables, tuning_table


def _printed(table: RenderableType) -> str:
    out = io.StringIO()
    Console(file=out, width=200, theme=Theme(STYLES)).print(table)
    return out.getvalue()


def _candidate(k: int, **changes: Any) -> Any:
    return made_results.candidate(k, **changes)


def test_the_choice_is_the_fastest_that_was_measured_and_names_its_rivals() -> None:
    """A greater prediction that nobody measured does not win; K that often win in the draws are named."""
    text = _printed(
        tuning_table(
            made_results.tuning(
                _candidate(1, predicted=1.2, chance_of_best=0.0),
                _candidate(2, predicted=1.5, measured=1.6, chance_of_best=0.6),
                _candidate(3, predicted=1.7, chance_of_best=0.4),
            )
        )
    )
    assert "K = 2: measured 1.60x, predicted 1.50x. K = 3 (best in 40% of the draws) may be as good." in text
    (row,) = [line for line in text.splitlines() if line.startswith("2 ")]
    assert row.split() == ["2", "2.000", "2.00", "20.00", "1.33", "1.50", "(1.40", "to", "1.60)", "1.60", "60%"]


def test_a_loss_and_an_unreliable_time_are_said() -> None:
    """Drafting that is slower than plain decoding is named so; a speed-up above tau is not a choice."""
    loss = _printed(tuning_table(made_results.tuning(_candidate(1, predicted=0.8, measured=0.9))))
    assert "Drafting does not pay" in loss
    speed = made_results.speed(speed_up=2.5, unmatched_baseline=True)
    busy = made_results.candidate(2, predicted=1.4)
    text = _printed(tuning_table(made_results.tuning(attrs.evolve(busy, measured=speed))))
    assert "K=2: 2.50x: more than tau allows" in text
    assert "K = 2: predicted 1.40x, not measured" in text


def test_a_schedule_is_printed_as_vllm_takes_it() -> None:
    """Ready to paste into --speculative-config; where no load pays, the verdict alone."""
    text = _printed(served_tuning_tables(made_results.served_tuning((1, 16, 3), (17, 64, 0))))
    assert '"num_speculative_tokens": 3, "num_speculative_tokens_per_batch_size": [[1, 16, 3], [17, 64, 0]]' in text
    never = _printed(served_tuning_tables(made_results.served_tuning((1, 64, 0))))
    assert "Drafting does not pay under any load." in never
    assert "per_batch_size" not in never
