"""`spec ls` on terminals of the usual widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.theme import Theme

from speculators.report.console import STYLES
from speculators.report.recipe import listing

BANDS = {"a_long_suite/K=3/T=0": [1.57, 1.75], "a_long_suite/K=5/T=0": [1.61, 1.82]}
RECIPE = {
    "name": "eagle3_qwen3_30b_a3b",
    "algorithm": "eagle3",
    "family": "SmolLM2-135M-Instruct.Q4_1",
    "hardware": "8 GPUs of 192 GB, planned",
    "summary": "EAGLE-3 for a verifier with a name that is as long as they come, one layer, 32k draft vocabulary",
    "expect": BANDS,
}


@pytest.mark.parametrize("width", [80, 120])
def test_names_and_bands_stay_whole(width: int) -> None:
    """A name can be copied, and a band is a line of its own: only the summary is wrapped."""
    out = io.StringIO()
    Console(file=out, theme=Theme(STYLES), width=width, highlight=False).print(listing([RECIPE], ["eagle3"], []))
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert RECIPE["family"] in lines
    assert any(line.startswith("eagle3_qwen3_30b_a3b  ") for line in lines)
    assert "8 GPUs of 192 GB, planned; known to reach" in " ".join(lines)
    assert [line for line in lines if "K=" in line] == [
        "a_long_suite/K=3/T=0: 1.57 to 1.75",
        "a_long_suite/K=5/T=0: 1.61 to 1.82",
    ]
