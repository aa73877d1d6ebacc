"""Memory does not grow with the number of conversations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[2] / "benchmarks" / "perf" / "memory.py"
SIZES = ("200", "1000")


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_conversations():
    """Five times the conversations, with 48 MB more of states, raise the peak by at most 20 MB (2 MB measured)."""
    runs = [subprocess.run([sys.executable, HARNESS, "--here", n], capture_output=True, check=True) for n in SIZES]
    few, many = (json.loads(run.stdout) for run in runs)
    assert many["store_mb"] > few["store_mb"] + 40
    assert many["peak_mb"] < few["peak_mb"] + 20
