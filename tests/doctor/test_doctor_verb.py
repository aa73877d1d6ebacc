"""`spec doctor` on the command line: the table, the exit code and usage errors."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from clinic import Clinic, rope
from command import Spec

from speculators.doctor.alignment import check_alignment
from speculators.doctor.effort import QUICK
from speculators.doctor.trials import DraftTrials
from speculators.events import ProgressEvent

pytestmark = pytest.mark.slow


@pytest.fixture
def spec(clinic: Clinic, tmp_path: Path) -> Spec:
    """The command line, with the clinic's cache."""
    command = Spec(tmp_path)
    command.cache = clinic.cache
    return command


def test_a_healthy_run_exits_with_0_and_says_so(spec: Spec, clinic: Clinic) -> None:
    """The checks of every family, the verdict and the rate of false alarms; it generates the answers itself."""
    outcome = spec("doctor", clinic.run, "--prompts", clinic.prompts, "--quiet")
    assert outcome.code == 0, outcome.out + outcome.err
    for words in ("loads: files", "rope theta", "layer ids", "step by step", "on-policy", "healthy: "):
        assert words in outcome.out
    assert "13 prompts of prompts" in outcome.out
    assert "probability of at most 0.01" in " ".join(outcome.out.split())
    assert "\x1b" not in outcome.out


def test_something_wrong_exits_with_1_and_comes_first(spec: Spec, clinic: Clinic, tmp_path: Path) -> None:
    """The JSON has the same content, and nothing else is on stdout."""
    speculator = clinic.copy(tmp_path)
    rope(rope_theta=1e6)(speculator)
    outcome = spec("doctor", speculator.parent, "--prompts", clinic.prompts, "--quiet")
    assert outcome.code == 1
    assert "not healthy" in outcome.out
    assert re.search(r"wrong +config/rope theta: ", outcome.out)
    assert "do: write 10000.0 back" in outcome.out
    examined = json.loads(spec("doctor", speculator, "--prompts", clinic.prompts, "--json").out)
    assert examined["healthy"] is False
    assert {check["family"] for check in examined["checks"]} == {
        "loads", "config", "alignment", "parity", "length", "data"
    }  # fmt: skip
    assert examined["seconds"] > 0


def test_quick_leaves_out_what_takes_long_and_says_so(spec: Spec, clinic: Clinic) -> None:
    """The commonest alternatives are still tried; rare ones, long contexts, 16 bits and the run's data are not."""
    outcome = spec("doctor", clinic.run, "--prompts", clinic.prompts, "--quick", "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    left_out = {f"{one['family']}/{one['name']}" for one in outcome.json["checks"] if "--quick" in one["evidence"]}
    assert {"length/all", "data/all", "parity/16 bits", "config/verifier's weights", "alignment/heads"} <= left_out
    assert len(left_out) < 20
    results = {f"{one['family']}/{one['name']}": one["result"] for one in outcome.json["checks"]}
    assert results["alignment/layer ids"] == results["alignment/projections"] == results["parity/step by step"] == "ok"


def test_progress_counts_the_alternatives(clinic: Clinic) -> None:
    """Both passes say how many of how many are tried; whole shifts of the layers come on top of the kept ones."""
    events: list[ProgressEvent] = []
    loaded = clinic.load(clinic.run / "speculator")
    list(check_alignment(DraftTrials(loaded, clinic.answers), QUICK, lambda event: events.append(event)))
    sample = [event for event in events if event.note == "sample"]
    assert [event.done for event in sample] == list(range(1, len(sample) + 1))
    assert {event.total for event in sample} == {len(sample)}
    assert 0 < sum(event.note == "all answers" for event in events) <= QUICK.keep + 2


BAD = {
    "no speculator": (["."], 2, "neither a run with a speculator nor a speculator"),
    "no such suite": (["RUN", "--suite", "mt_bench_5"], 1, "no suite 'mt_bench_5'"),
    "no such prompts": (["RUN", "--prompts", "nowhere.jsonl"], 1, "no such file"),
    "both": (["RUN", "--prompts", "a.jsonl", "--suite", "quickstart"], 2, "not allowed with"),
    "no verifier": (["RUN", "--verifier", "./nowhere"], 1, "there is no verifier at"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_usage_errors_have_no_traceback(
    spec: Spec, clinic: Clinic, mistake: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each usage error has its exit code and its message."""
    arguments, code, words = BAD[mistake]
    os.chdir(spec.home)
    outcome = spec("doctor", *(clinic.run if one == "RUN" else one for one in arguments))
    assert outcome.code == code, outcome.err
    assert words in outcome.err + capfd.readouterr().err
    assert "Traceback" not in outcome.err


def test_an_imported_checkpoint_is_examined_like_ours(spec: Spec, clinic: Clinic, tmp_path: Path) -> None:
    """Exported and imported again in 16 bits it is healthy; checks that need the run are not made."""
    for arguments in (
        ("export", clinic.run, "--to", "vllm", "--out", tmp_path / "out"),
        ("import", tmp_path / "out", "--verifier", clinic.verifier, "--out", tmp_path / "in"),
    ):
        outcome = spec(*arguments, "--quiet")
        assert outcome.code == 0, outcome.err
    outcome = spec("doctor", tmp_path / "in", "--prompts", clinic.prompts, "--json")
    assert outcome.code == 0, outcome.out
    results = {f"{check['family']}/{check['name']}": check["result"] for check in outcome.json["checks"]}
    assert results["loads/head"] == results["alignment/layer ids"] == results["config/rope theta"] == "ok"
    assert results["config/chat template"] == results["data/loss mask"] == "not checked"
