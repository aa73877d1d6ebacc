"""Memory does not grow with the number of conversations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[2] / "benchmarks" / "perf" / "memory.py"
# Both fill more shards than are in memory at once: one is filled, one waits, one is written.
SIZES = ("600", "2400")


@pytest.mark.slow
def test_memory_is_flat_in_the_number_of_conversations():
    """Four times the conversations, with 115 MB more of states, raise the peak by at most 30 MB (13 to 15 measured)."""
    runs = [subprocess.run([sys.executable, HARNESS, "--here", n], capture_output=True, check=True) for n in SIZES]
    few, many = (json.loads(run.stdout) for run in runs)
    assert many["store_mb"] > few["store_mb"] + 100
    assert many["peak_mb"] < few["peak_mb"] + 30
