"""`hidden_states = "server"` end to end: the smoke recipe with its states from a server in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Outcome, Spec, events
from fake_vllm import FakeServer
from smoke_states import folder_and_states, smoke_verifier

from speculators.pipeline import context
from speculators.verifier.engine import Engine

# float32 sums over another batch differ, as between cached and online states.
LOSS_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def engine(spec: Spec, run_folder: Path) -> Engine:
    """The smoke recipe's verifier, made by its run."""
    return smoke_verifier(spec)


@pytest.fixture
def served(fresh: Spec, engine: Engine) -> Iterator[FakeServer]:
    """A server of the verifier's states, started as by `spec serve-states` with the same folder."""
    with FakeServer(*folder_and_states(fresh, engine), max_model_len=257) as running:
        yield running


def run(fresh: Spec, served: FakeServer, *more: object) -> Outcome:
    return fresh.run(*settings(served), *more)


def settings(served: FakeServer, *more: str) -> list[str]:
    sets = ['data.hidden_states="server"', f'data.server.endpoints=["{served.url}"]', "benchmark.live_prompts=1", *more]
    return [part for setting in sets for part in ("--set", setting)]


def test_training_on_a_servers_states_gives_the_same_losses(fresh: Spec, served: FakeServer, run_folder: Path) -> None:
    """The losses equal those of a run with cached states; the store is a separate one; the shared folder is left
    empty."""
    outcome = run(fresh, served)
    assert outcome.code == 0, outcome.err
    assert "check states done" in outcome.err
    assert "by vllm 0.32.0" in outcome.err
    (folder,) = fresh.runs.iterdir()
    assert folder.name != run_folder.name
    for one, other in zip(events(run_folder, "StepEvent")[:8], events(folder, "StepEvent"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=LOSS_TOLERANCE)
    assert list(served.folder.iterdir()) == []
    assert served.most_at_once > 1
    # A re-run requests the same server again, and need not match to the bit.
    made = fresh("reproduce", folder, "--to", fresh.home / "again", "--until", "capture", "--json")
    assert (made.code, made.json["tolerance"]) == (0, 0.01)
    assert "a server computed the states" in made.json["promise"]
    requests = len(served.requests)
    again = run(fresh, served, "--set", "data.server.concurrency=3")
    assert "train already done" in again.err
    assert len(served.requests) == requests
    # The stored states are compared on demand, without the server.
    check = fresh("data", "smoke", "--check-states", "--sample", 3, "--json", *settings(served))
    assert (check.code, check.json["conversations"], check.json["problems"]) == (0, 3, [])
    assert str(fresh.cache) in check.json["source"]
    assert len(served.requests) == requests


def test_a_server_that_evaluates_gives_the_same_acceptance(
    fresh: Spec, served: FakeServer, engine: Engine, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process loads the verifier; taus are those of the run that does, and live decoding is left out with a reason.

    The files of states that come with the answers are removed as well.
    """

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        (ids,) = engine.generate([body["prompt"]], max_new_tokens=body["max_tokens"])
        return {"text": "a", "token_ids": ids}

    served.answers = answer
    monkeypatch.setattr(context, "Engine", None)
    served.model["max_model_len"] = 1024
    outcome = run(fresh, served, "--set", "data.server.evaluate=true")
    assert outcome.code == 0, outcome.err
    assert "no process holds the whole verifier: serve the export" in outcome.err
    (folder,) = fresh.runs.iterdir()
    taus = [[event["tau"] for event in events(place, "EvalEvent")][:2] for place in (run_folder, folder)]
    assert taus[0] == taus[1]
    benches = [json.loads(next((place / "bench").glob("*.json")).read_text()) for place in (run_folder, folder)]
    exact = [[setting["exact"]["tau"] for setting in each["settings"]] for each in benches]
    assert exact[0] == exact[1]
    assert [setting["live"] for setting in benches[1]["settings"]] == [None] * len(exact[1])
    assert list(served.folder.iterdir()) == []


def test_a_server_that_dies_is_reported_and_the_next_run_goes_on(fresh: Spec, served: FakeServer) -> None:
    """The error is the server's own message without a traceback; the next run requests only the missing states and
    reports another engine."""
    small = "--set", "schedule.max_steps=1", "--set", "benchmark.suites=[]", "--set", "data.server.retries=0"
    many = "--set", 'data.sources=[{path="data/quickstart.jsonl", split="train", take=120}]'
    served.faults.extend([""] * 100 + ["500"] * 1000)
    outcome = run(fresh, served, *small, *many)
    assert outcome.code == 1
    assert "EngineCore encountered an issue" in outcome.err
    assert "Traceback" not in outcome.err
    (store,) = (fresh.cache / "states").glob("[!.]*")
    whole = len(list(store.glob("states-*.json")))
    assert whole > 0
    assert fresh.half_written() == []
    served.faults.clear()
    served.requests.clear()
    served.model["owned_by"] = "sglang"
    outcome = run(fresh, served, *small, *many)
    assert outcome.code == 0, outcome.err
    assert "a part was captured by vllm 0.32.0" in outcome.err
    assert "the server's states are not compared" in outcome.err
    assert 20 <= len(served.requests) < 120
    assert len(list(store.glob("states-*.json"))) > whole


def test_a_wrong_layer_id_cannot_pass(fresh: Spec, served: FakeServer) -> None:
    """The first conversations are compared before the rest is requested, and the layer is named."""
    right = served.states
    served.states = lambda tokens: right(tokens)[:, [1, 1, 2, 3]]
    outcome = run(fresh, served)
    assert outcome.code == 1
    assert "match layer" in outcome.err
    assert "spec serve-states gives it those of the recipe" in outcome.err
    assert len(served.requests) == 4
    # The same without a run, as a table.
    check = fresh("data", "smoke", "--check-states", *settings(served))
    assert check.code == 1
    assert "match layer" in check.out
    assert served.url in check.out


def test_a_server_of_other_states_is_recognised_by_its_note(fresh: Spec, served: FakeServer) -> None:
    """The folder records what `spec serve-states` was started for."""
    note = {"verifier": "x", "layer_ids": [0, 1, 2], "states_dtype": "float32"}
    (served.folder / "serving.json").write_text(json.dumps(note))
    outcome = run(fresh, served)
    assert outcome.code == 1
    assert "was started for different states" in outcome.err
    assert "layer_ids [0, 1, 2] instead of" in outcome.err
    assert served.requests == []


def test_impossible_captures_are_reported_before_they_start(fresh: Spec, served: FakeServer) -> None:
    """A conversation too long for the server, a folder that nobody writes to and a dead address are errors."""
    served.model["max_model_len"] = 60
    outcome = run(fresh, served)
    assert (outcome.code, served.requests) == (1, [])
    assert "takes 60 tokens, one of them to answer; the longest conversation has" in outcome.err
    nowhere = "--set", 'data.server.folder="/nowhere/at/all"'
    assert "/nowhere/at/all: no such folder" in run(fresh, served, *nowhere).err
    gone = "--set", 'data.server.endpoints=["http://127.0.0.1:9"]', "--set", "data.server.retries=0"
    outcome = run(fresh, served, *gone)
    assert outcome.code == 1
    assert "connection refused" in outcome.err


def test_options_without_meaning_beside_check_states_are_refused(fresh: Spec) -> None:
    """--check-states prints no conversations and draws no sample; all useless options are reported together."""
    outcome = fresh("data", "smoke", "--check-states", "--show", 1, "--id", "a", "--sample", 0)
    assert (outcome.code, outcome.out) == (2, "")
    options = [line.partition(": ")[2].split(":")[0] for line in outcome.err.splitlines()]
    assert options == ["--show", "--id", "--sample"]


def test_online_states_cannot_be_checked(fresh: Spec) -> None:
    """Online states are not stored, and cached states that are not captured yet do not exist."""
    outcome = fresh("data", "smoke", "--check-states", "--set", 'data.hidden_states="online"')
    assert (outcome.code, outcome.out) == (2, "")
    assert "stores no states" in outcome.err
    assert fresh("data", "smoke", "--check-states").code == 1


def test_answers_come_from_a_server(fresh: Spec, served: FakeServer, engine: Engine, tmp_path: Path) -> None:
    """The text equals the verifier's in process, and the engine is recorded; an interrupted call resumes."""
    rows = [{"id": str(n), "messages": [{"role": "user", "content": f"What is {n}?"}]} for n in range(6)]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = "--set", "data.regenerate={max_new_tokens=6, batch_size=1}"

    def answer(body: dict) -> dict:
        (ids,) = engine.generate([body["prompt"]], max_new_tokens=body["max_tokens"])
        return {"text": "unused", "token_ids": ids}

    served.answers, served.states = answer, None
    served.faults.extend(["", "", "400"])
    by = "--endpoint", f"{served.url}/v1", "--concurrency", "1"
    outcome = fresh("regenerate", "smoke", prompts, "--out", tmp_path / "served.jsonl", *made, *by)
    assert (outcome.code, (tmp_path / "served.jsonl").exists()) == (1, False)
    assert "maximum context length" in outcome.err
    outcome = fresh("regenerate", "smoke", prompts, "--out", tmp_path / "served.jsonl", *made, *by, "--json")
    assert outcome.code == 0, outcome.err
    # Each call tries one answer first: trial, an answer and the failure; then trial and the five that are missing.
    assert len(served.requests) == 3 + 6
    assert outcome.json["engine"] == {
        "engine": "vllm",
        "version": "0.32.0",
        "model": "the-model",
        "root": "/models/it",
        "max_model_len": 257,
    }
    fresh("regenerate", "smoke", prompts, "--out", tmp_path / "own.jsonl", *made)
    assert (tmp_path / "served.jsonl").read_text() == (tmp_path / "own.jsonl").read_text()
    assert not list(tmp_path.glob("*.part"))
