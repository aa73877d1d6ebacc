"""`spec bench RUN --audit` compares a server with the run round for round, and files what it found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import Spec
from decoding_server import DecodingServer
from fake_server import served

from speculators.verifier.engine import Engine


@pytest.fixture
def run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy of the smoke run."""
    return Path(shutil.copytree(run_folder, tmp_path / run_folder.name))


@pytest.fixture
def verifier(run: Path) -> Engine:
    """The run's verifier."""
    config = json.loads((run / "speculator" / "config.json").read_text())
    return Engine(Path(config["speculators_config"]["verifier"]["name_or_path"]), dtype="float32")


def test_an_audit_is_printed_and_filed_beside_the_other_benchmarks(spec: Spec, run: Path, verifier: Engine) -> None:
    """A server of the run's own speculator passes: exit code 0, as a table and as JSON."""
    with served(DecodingServer(verifier=verifier, speculator=run / "speculator")) as fake:
        command = ("bench", run, "--engine", "vllm", "--endpoint", fake.url, "--audit", "--prompts", "2")
        printed, outcome = spec(*command), spec(*command, "--json")
    assert (printed.code, outcome.code) == (0, 0), printed.err
    assert "every round is as predicted" in printed.out
    (file,) = (run / "bench" / "audits").glob("vllm-1.2.3-*.json")
    filed = json.loads(file.read_text())
    assert outcome.json == {**filed, "file": str(file)}
    assert filed["passes"]
    assert (filed["tally"]["answers"], filed["differing"]) == (2, [])
    assert filed["tally"]["rounds"] == filed["tally"]["agreeing"] > 0
    # Other readers of the run's benchmarks are not disturbed.
    assert spec("bench", run, "--ledger").code == 0


def test_a_server_that_accepts_other_drafts_fails(spec: Spec, run: Path, verifier: Engine) -> None:
    """Exit code 1: by its report, here altered, the first round of each answer accepts a draft."""

    class Altered(DecodingServer):
        def report(self, accepted):
            tokens = sum(accepted) + len(accepted)
            return super().report([1, *[0] * (tokens - 2)])

    with served(Altered(verifier=verifier, speculator=run / "speculator")) as fake:
        outcome = spec("bench", run, "--engine", "vllm", "--endpoint", fake.url, "--audit", "--prompts", "2", "--json")
    assert outcome.code == 1
    assert not outcome.json["passes"]
    first = [each for each in outcome.json["differing"] if each["number"] == 0]
    assert [(each["predicted"], each["served"], each["depth"]) for each in first] == [(0, 1, 1)] * 2


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (("--audit",), "--audit: only for a running server"),
        (("--engine", "vllm", "--endpoint", "http://h", "--server-dtype", "float16"), "--server-dtype needs --audit"),
        (
            ("--engine", "vllm", "--endpoint", "http://h", "--audit", "--temperature", "1"),
            "an audit compares rounds at",
        ),
        (("--engine", "vllm", "--endpoint", "http://h", "--audit", "--top-p", "0.9"), "--top-p: an audit compares"),
        (
            ("--engine", "vllm", "--endpoint", "http://h", "--audit", "--baseline-endpoint", "http://i"),
            "--baseline-endpoint: an audit compares",
        ),
    ],
)
def test_options_that_an_audit_would_ignore_are_refused(spec: Spec, run_folder: Path, options, fault) -> None:
    """Before the server is asked."""
    outcome = spec("bench", run_folder, *options)
    assert outcome.code == 2
    assert fault in outcome.err
