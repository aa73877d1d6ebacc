"""An ablation's table fits a terminal, marks what holds, and says what it rests on."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from rich.theme import Theme

from speculators.ablation.result import AblationResult, ArmResult, ArmSeed
from speculators.ablation.statistics import TauDifference
from speculators.report.ablation import ablation_markdown, ablation_plot, ablation_table
from speculators.report.console import STYLES


def difference(mean: float = 0.031, **changes: Any) -> TauDifference:
    values: dict[str, Any] = {
        "low": mean - 0.019,
        "high": mean + 0.019,
        "seeds": 3,
        "prompts": 64,
        "seed_error": 0.006,
        "prompt_error": 0.005,
        "freedom": 20.0,
        "p": 0.003,
    }
    return TauDifference(mean=mean, **(values | changes))


def arm(name: str, tau: float = 1.7, **changes: Any) -> ArmResult:
    rows = tuple(ArmSeed(seed=seed, run=f"runs/{name}", tau=tau, first=0.4, training_minutes=6.2) for seed in range(3))
    return ArmResult(**({"name": name, "options": (f"schedule.epochs={len(name)}",), "seeds": rows} | changes))


def result(*arms: ArmResult, **changes: Any) -> AblationResult:
    values: dict[str, Any] = {
        "name": "mine",
        "file": "mine.toml",
        "recipe": "quickstart",
        "options": (),
        "setting": "quickstart/K=5/T=0",
        "definition": "tau is counted",
        "prompts": 64,
        "seeds": (0, 1, 2),
        "seed_deviation": 0.0123,
        "unfinished": 0,
    }
    return AblationResult(arms=(arm("base", options=()), *arms), **(values | changes))


def printed(shown: AblationResult) -> list[str]:
    out = io.StringIO()
    Console(width=80, theme=Theme(STYLES), file=out).print(ablation_table(shown))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_the_table_fits_into_80_columns() -> None:
    """A long name is folded, and no number is cut."""
    name = "a variant whose name says everything that it changes in the recipe"
    lines = printed(result(arm(name, 1.731, difference=difference(), holds=True)))
    assert max(map(len, lines)) <= 80
    row = next(line for line in lines if "+0.031" in line)
    assert "1.731  +0.031 (+0.012 to +0.050)*  0.40       6.2" in row
    text = " ".join(" ".join(lines).split())
    assert "a run's tau moves by 0.012 (standard deviation)" in text
    assert "* differs from the base at 5%" in text
    assert "over all" not in text


def test_one_seed_marks_nothing() -> None:
    """The note says what the interval leaves out."""
    single = difference(seeds=1, seed_error=None)
    lines = printed(result(arm("adamw", difference=single, holds=None), seeds=(0,), seed_deviation=None))
    assert not any("*" in line for line in lines)
    assert "intervals over prompts only" in " ".join(lines)


def test_failures_and_doubts_stand_below_the_table() -> None:
    """A run that failed, a number that live decoding contradicts, and what was compared over fewer seeds."""
    failed = ArmSeed(seed=2, failure="the loss is not finite")
    doubtful = ArmSeed(seed=1, run="half-1", tau=1.8, agrees=False)
    shown = result(
        arm("half", seeds=(ArmSeed(seed=0, tau=1.7), doubtful, failed), difference=difference(seeds=2)),
        arm("none", seeds=(failed,)),
    )
    text = "\n".join(printed(shown))
    assert not shown.is_sound
    assert "half, seed 2 failed: the loss is not finite" in text
    assert "half-1: live decoding disagrees with replay: spec doctor half-1" in text
    assert "compared over fewer seeds: half (2)" in text
    assert next(line for line in text.splitlines() if line.startswith("none ")).split() == ["none", "failed"]


def test_markdown_has_the_same_numbers() -> None:
    """The mark is escaped, and each variant lists its options."""
    text = ablation_markdown(result(arm("adamw", difference=difference(), holds=True), options=("seed=3",)))
    assert "| adamw | 1.700 | +0.031 (+0.012 to +0.050)\\* | 0.40 | 6.2 |" in text
    assert "* recipe: `quickstart`\n* all: `seed=3`\n* adamw: `schedule.epochs=5`\n" in text


def test_the_plot_has_a_row_for_each_difference() -> None:
    """A variant without a difference is left out; without any there is no plot."""
    pytest.importorskip("matplotlib", reason="pip install 'spec-recipes[report]'")
    plot = ablation_plot(result(arm("adamw", difference=difference()), arm("failed")))
    assert ">adamw</text>" in plot
    assert "failed" not in plot
    assert ablation_plot(result(arm("failed"))) == ""
