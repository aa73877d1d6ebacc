"""`spec ls` on terminals of the usual widths."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.theme import Theme

from speculators.report.console import STYLES
from speculators.report.recipe import listing
from speculators.runs.summary import BestNumber, RunSummary

BANDS = {"a_long_suite/K=3/T=0": [1.57, 1.75], "a_long_suite/K=5/T=0": [1.61, 1.82]}
RECIPE = {
    "name": "eagle3_qwen3_30b_a3b",
    "algorithm": "eagle3",
    "family": "SmolLM2-135M-Instruct.Q4_1",
    "usual_time": "est. 75 min, 8 GPUs of 192 GB",
    "summary": "EAGLE-3 for a verifier with a name that is as long as they come, one layer, 32k draft vocabulary",
    "expect": BANDS,
}
RUN = RunSummary(
    folder=Path("runs/quickstart_short-1a2b3c4d"),
    recipe="quickstart_short",
    last_worked=1.8e9,
    is_running=True,
    state="training 62%",
    changes={"seed": 1, "schedule.optimizer.lr": 2e-4},
    best=BestNumber(suite="s", num_speculative_tokens=5, temperature=0.0, tau=1.727, speed_up=1.01),
)


def shown(width: int, *, long: bool) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, theme=Theme(STYLES), width=width, highlight=False)
    console.print(listing([RECIPE], ["eagle3"], [RUN], long=long))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("width", [80, 120])
def test_a_recipe_is_one_line_and_with_long_its_bands_follow(width: int) -> None:
    """A name can be copied, and a band is a line of its own: only the summary is wrapped."""
    lines = shown(width, long=False)
    assert "recipes for SmolLM2-135M-Instruct.Q4_1" in lines
    assert [line.split() for line in lines if line.startswith("eagle3_qwen3_30b_a3b")] == [
        [
            "eagle3_qwen3_30b_a3b",
            "eagle3",
            *["est.", "75", "min,", "8", "GPUs", "of", "192", "GB"],
            *["tau", "1.61", "to", "1.82"],
        ]
    ]
    assert not [line for line in lines if "K=3" in line]
    assert [line.strip() for line in shown(width, long=True) if "a_long_suite" in line] == [
        "a_long_suite/K=3/T=0: tau 1.57 to 1.75",
        "a_long_suite/K=5/T=0: tau 1.61 to 1.82",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_comes_first_with_its_state_changes_and_best_number(width: int) -> None:
    """One line, and one more for each value from the command line."""
    header, run, *rest = shown(width, long=False)
    assert header.split() == ["run", "last", "worked", "state", "tau", "speed-up"]
    name, _date, _time, *others = run.split()
    assert [name, *others] == ["quickstart_short-1a2b3c4d", "training", "62%", "1.727", "(K=5)", "1.01"]
    assert rest[:2] == ["  seed = 1", "  lr = 0.0002"]
