"""`spec bench RUN --endpoint` stores what a server measured in the run; `--ledger` compares it with the prediction."""

from __future__ import annotations

import json

import pytest
from fake_server import FakeServer, served


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("speculators.servers.counters.SETTLE_SECONDS", 0.01)


def test_a_served_benchmark_is_stored_and_the_ledger_raises_an_alarm(spec, run):
    """A server that accepts everything contradicts the prediction: exit 1, causes, and the next step. Before that,
    the run's own numbers agree. Reports and comparisons of the in-process benchmark do not change."""
    outcome = spec("bench", run, "--ledger", "--json")
    assert outcome.code == 0, outcome.err
    kinds = [[entry["kind"] for entry in line["entries"]] for line in outcome.json["lines"]]
    assert kinds == [["predicted in training", "predicted", "measured live"]] * 2
    with served(FakeServer(pattern=(3,))) as fake:
        command = ("bench", run, "--engine", "vllm", "--endpoint", fake.url)
        outcome = spec(*command, "--prompts", "2", "--concurrency", "2")
        assert outcome.code == 0, outcome.err
        assert "served acceptance of smoke-" in outcome.out
        outcome = spec(*command, "--baseline-endpoint", fake.url)
        assert (outcome.code, "cannot be the baseline" in outcome.err) == (1, True)
        outcome = spec(*command, "--k", "1")
        assert (outcome.code, "but --k is 1" in outcome.err) == (1, True)
    (file,) = (run / "bench" / "served").glob("vllm-1.2.3-*.json")
    written = json.loads(file.read_text())
    assert len(written["settings"][0]["prompt_ids"]) == 2
    outcome = spec("bench", run, "--ledger")
    assert outcome.code == 1
    assert "ALARM quickstart, K=3, T=0: served (vllm 1.2.3): 3.8" in outcome.out
    assert f"spec doctor {run / 'speculator'}" in outcome.out
    assert spec("diff", run, run).code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "vllm"), "--engine and --endpoint go together"),
        (("--endpoint", "http://here"), "--engine and --endpoint go together"),
        (("--engine", "vllm", "--endpoint", "http://here", "--k", "1", "--k", "2"), "drafts with one K"),
        (("--engine", "vllm", "--endpoint", "http://here", "--live", "1"), "measured in process"),
    ],
)
def test_options_that_do_not_fit_are_reported_before_anything_is_loaded(spec, run, options, message):
    """The exit code is 2, as for every mistake in usage."""
    outcome = spec("bench", run, *options)
    assert (outcome.code, message in outcome.err) == (2, True)


def test_a_folder_that_is_not_a_run_has_no_ledger(spec, tmp_path):
    """The error names the command that lists runs."""
    outcome = spec("bench", tmp_path, "--ledger")
    assert outcome.code == 2
    assert "is not a run: it has neither plan.json nor events.jsonl" in outcome.err
