"""`spec doctor` through the command line: the table, the exit code, what a user can get wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from clinic import Clinic, rope
from command import Spec

pytestmark = pytest.mark.slow


@pytest.fixture
def spec(clinic: Clinic, tmp_path: Path) -> Spec:
    """The command line, with the clinic's cache."""
    command = Spec(tmp_path)
    command.cache = clinic.cache
    return command


def test_a_healthy_run_exits_with_0_and_says_so(spec: Spec, clinic: Clinic) -> None:
    """One table with every family, the verdict and the rate of false alarms; the verifier answers by itself."""
    told = spec("doctor", clinic.run, "--prompts", clinic.prompts, "--quiet")
    assert told.code == 0, told.out + told.err
    for words in ("check", "what to do", "rope theta", "layer ids", "step by step", "on-policy", "healthy: "):
        assert words in told.out
    assert "13 prompts of prompts" in told.out
    assert "probability of 0.01" in told.out
    assert "\x1b" not in told.out


def test_something_wrong_exits_with_1_and_stands_below_the_table(spec: Spec, clinic: Clinic, tmp_path: Path) -> None:
    """As JSON, too; nothing else is on stdout."""
    speculator = clinic.copy(tmp_path)
    rope(rope_theta=1e6)(speculator)
    told = spec("doctor", speculator.parent, "--prompts", clinic.prompts, "--quiet")
    assert told.code == 1
    assert "not healthy" in told.out
    assert "wrong config/rope theta: " in told.out
    found = json.loads(spec("doctor", speculator, "--prompts", clinic.prompts, "--json").out)
    assert found["healthy"] is False
    assert {check["family"] for check in found["checks"]} == {
        "loads", "config", "alignment", "parity", "length", "data"
    }  # fmt: skip
    assert found["seconds"] > 0


BAD = {
    "no speculator": (["."], 1, "neither a run with a speculator nor a speculator"),
    "no such suite": (["RUN", "--suite", "mt_bench_5"], 1, "no suite 'mt_bench_5'"),
    "no such prompts": (["RUN", "--prompts", "nowhere.jsonl"], 1, "no such file"),
    "both": (["RUN", "--prompts", "a.jsonl", "--suite", "quickstart"], 2, "not allowed with"),
    "no verifier": (["RUN", "--verifier", "./nowhere"], 1, "there is no verifier at"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_are_told_without_a_traceback(
    spec: Spec, clinic: Clinic, mistake: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The code and the words."""
    arguments, code, words = BAD[mistake]
    os.chdir(spec.home)
    told = spec("doctor", *(clinic.run if one == "RUN" else one for one in arguments))
    assert told.code == code, told.err
    assert words in told.err + capfd.readouterr().err
    assert "Traceback" not in told.err


def test_an_imported_checkpoint_is_examined_like_ours(spec: Spec, clinic: Clinic, tmp_path: Path) -> None:
    """Out in another layout, in again, in 16 bits: healthy, and what only a run can tell is not checked."""
    for arguments in (
        ("export", clinic.run, "--to", "vllm", "--out", tmp_path / "out"),
        ("import", tmp_path / "out", "--verifier", clinic.verifier, "--out", tmp_path / "in"),
    ):
        told = spec(*arguments, "--quiet")
        assert told.code == 0, told.err
    told = spec("doctor", tmp_path / "in", "--prompts", clinic.prompts, "--json")
    assert told.code == 0, told.out
    results = {f"{check['family']}/{check['name']}": check["result"] for check in told.json["checks"]}
    assert results["loads/head"] == results["alignment/layer ids"] == results["config/rope theta"] == "ok"
    assert results["config/chat template"] == results["data/loss mask"] == "not checked"
