"""Processes of one machine: whose output is shown, and the exit code."""

from __future__ import annotations

import signal

import pytest

from speculators.errors import TrainingError
from speculators.training.launch import launch

# Rank 0 is still at work when the other one ends.
SCRIPT = """
import os, sys, time
if os.environ["RANK"] == "0":
    time.sleep(60)
print("error: recipe.toml: 999 is too many", file=sys.stderr)
sys.exit({code})
"""


def test_a_mistake_in_the_recipe_is_reported_by_the_first_process_to_see_it(capfd):
    """Only its message is shown, with the exit code of a bad recipe, as with one process; Ctrl-C works as before."""
    before = signal.getsignal(signal.SIGINT)
    assert launch(["-c", SCRIPT.format(code=2)], nproc=2) == 2
    assert capfd.readouterr().err == "error: recipe.toml: 999 is too many\n"
    assert signal.getsignal(signal.SIGINT) == before


def test_a_process_that_fails_alone_is_named():
    """Any other failure of a process other than rank 0 is reported with its rank, its code and its stderr."""
    with pytest.raises(TrainingError, match=r"process 1 failed with code 1:\nerror: recipe.toml: 999 is too many"):
        launch(["-c", SCRIPT.format(code=1)], nproc=2)
