"""`hidden_states = "streamed"` end to end: the smoke recipe on the states of two servers in this process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import Outcome, Spec, events
from fake_vllm import FakeServer
from smoke_states import folder_and_states, smoke_verifier

from speculators.verifier.engine import Engine

# float32 sums over another batch differ, as between cached and online states.
LOSS_TOLERANCE = 1e-6
SHORT = "benchmark.suites=[]", "data.server.retries=1"


@pytest.fixture(scope="module")
def engine(spec: Spec, run_folder: Path) -> Engine:
    """The smoke recipe's verifier, made by its run."""
    return smoke_verifier(spec)


@pytest.fixture
def servers(fresh: Spec, engine: Engine) -> Iterator[list[FakeServer]]:
    """Two servers of the verifier's states, which share the folder that `spec serve-states` names."""
    folder, states = folder_and_states(fresh, engine)
    # One model computes for both, and it is not thread-safe.
    turn = threading.Lock()

    def one_by_one(tokens: list[int]) -> object:
        with turn:
            return states(tokens)

    with FakeServer(folder, one_by_one) as one, FakeServer(folder, one_by_one) as other:
        yield [one, other]


def flags(servers: list[FakeServer], *more: str) -> list[str]:
    urls = ", ".join(f'"{server.url}"' for server in servers)
    sets = ['data.hidden_states="streamed"', f"data.server.endpoints=[{urls}]", "data.server.concurrency=4", *more]
    return [part for setting in sets for part in ("--set", setting)]


def run(fresh: Spec, servers: list[FakeServer], *more: str) -> Outcome:
    return fresh.run(*flags(servers, *more))


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in events(folder, "StepEvent")]


def die_after(server: FakeServer, requests: int) -> None:
    """Makes a server refuse connections once it has received so many requests."""
    right = server.states

    def states(tokens: list[int]) -> object:
        if len(server.requests) == requests:
            server.die()
        return right(tokens)

    server.states = states


def test_a_server_dies_and_training_goes_on(fresh: Spec, servers: list[FakeServer], run_folder: Path) -> None:
    """The losses equal those with cached states; nothing is stored, the shared folder is left empty; the run says who
    was left out, and that other bits may come the next time."""
    die_after(servers[0], 12)
    outcome = run(fresh, servers, "benchmark.live_prompts=1", "data.server.retries=1")
    assert outcome.code == 0, outcome.err
    (folder,) = fresh.runs.iterdir()
    assert losses(folder) == pytest.approx(losses(run_folder)[:8], rel=LOSS_TOLERANCE)
    assert "check states done" in outcome.err
    details = [event["detail"] for event in events(folder, "StageEvent") if event["stage"] == "servers"]
    assert details[-1] == f"vllm 0.32.0 at {servers[0].url}, {servers[1].url}"
    warnings = [event["message"] for event in events(folder, "WarningEvent")]
    assert any(f"{servers[0].url}" in message and "is left out after 3 failures" in message for message in warnings)
    assert any("training again may give other bits: servers compute the states anew" in each for each in warnings)
    assert len(servers[0].requests) < len(servers[1].requests)
    assert not (fresh.cache / "states").exists()
    assert list(servers[1].folder.iterdir()) == []
    made = fresh("reproduce", folder, "--to", fresh.home / "again", "--until", "prepare", "--json")
    assert "a server computed the states" in made.json["promise"]


def test_a_killed_run_requests_only_what_its_next_steps_need(fresh: Spec, servers: list[FakeServer]) -> None:
    """When no server answers any more the error names conversation and server; the next launch goes on from the
    checkpoint, and its losses are those of a run that nothing stopped."""
    steps = "schedule.checkpoint_every=2"
    for server in servers:
        server.faults.extend([""] * 9 + ["500"] * 1000)
    outcome = run(fresh, servers, *SHORT, steps)
    assert outcome.code == 1
    assert "error: conversation " in outcome.err
    assert "EngineCore encountered an issue (tried 2 times)" in outcome.err
    assert "Traceback" not in outcome.err
    (folder,) = fresh.runs.iterdir()
    done = len(losses(folder))
    assert 2 <= done < 8
    for server in servers:
        server.faults.clear()
        server.requests.clear()
    outcome = run(fresh, servers, *SHORT, steps)
    assert outcome.code == 0, outcome.err
    resumed = losses(folder)[done:]
    assert len(resumed) < 8
    # About four conversations make a step.
    assert sum(len(server.requests) for server in servers) < 5 * len(resumed)
    whole = fresh("run", "smoke", "--runs", fresh.home / "whole", "--set", SHORT[0])
    assert whole.code == 0, whole.err
    (cached,) = (fresh.home / "whole").iterdir()
    assert resumed == pytest.approx(losses(cached)[-len(resumed) :], rel=LOSS_TOLERANCE)


def test_states_of_other_tokens_stop_training(fresh: Spec, servers: list[FakeServer]) -> None:
    """They are refused, not requested elsewhere; the error names the conversation and the server."""
    servers[1].faults.extend([""] * 5 + ["tokens"])
    outcome = run(fresh, servers, *SHORT)
    assert outcome.code == 1
    message = " ".join(outcome.err.split())
    assert "error: conversation " in message
    assert f": {servers[1].url}, cmpl-" in message
    assert "the states belong to different tokens" in message
    assert "Traceback" not in outcome.err


def test_a_sample_is_compared_without_a_run(fresh: Spec, servers: list[FakeServer]) -> None:
    """`spec data --check-states` asks both servers, and names them."""
    check = fresh("data", "smoke", "--check-states", "--sample", 4, "--json", *flags(servers))
    assert (check.code, check.json["conversations"], check.json["problems"]) == (0, 4, [])
    assert check.json["source"] == f"{servers[0].url}, {servers[1].url}"
    assert [len(server.requests) for server in servers] == [2, 2]


def test_a_server_that_never_answers_is_left_out(fresh: Spec, servers: list[FakeServer]) -> None:
    """A launch starts with those that do, and says so. It removes what a killed one left, but not the states that
    another run has just requested."""
    servers[0].die()
    old, new = (servers[0].folder / f"cmpl-{age}.safetensors" for age in ("old", "new"))
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    outcome = run(fresh, servers, *SHORT, "schedule.max_steps=1", "data.server.retries=0")
    assert outcome.code == 0, outcome.err
    assert "this server is left out of this launch" in " ".join(outcome.err.split())
    assert list(servers[0].folder.iterdir()) == [new]


def test_a_plan_stores_no_states(fresh: Spec) -> None:
    """No stage captures, no disk is needed, and no process holds the verifier while it trains."""
    plan = fresh("plan", "smoke", "--json", "--set", 'data.hidden_states="streamed"').json
    assert [stage["name"] for stage in plan["stages"]] == ["verifier", "prepare", "train", "bench"]
    costs = plan["costs"]
    assert costs["disk"]["hidden states"] == 0
    online = fresh("plan", "smoke", "--json", "--set", 'data.hidden_states="online"').json["costs"]
    memory, beside = costs["devices"][0]["memory"], online["devices"][0]["memory"]
    assert memory["verifier"] < beside["verifier"]
    # Two conversations of at most 256 tokens for each of eight requests, four states of 32 float32 numbers a token.
    assert memory["rows"] - beside["rows"] == 2 * 8 * costs["mean_tokens"] * 4 * 32 * 4


@pytest.mark.slow
def test_two_processes_share_the_servers(fresh: Spec, servers: list[FakeServer], run_folder: Path) -> None:
    """Each asks for its own conversations; a server that dies stops neither; the losses are those of one process with
    cached states, but for the order in which gradients are summed."""
    die_after(servers[0], 15)
    command = [sys.executable, "-m", "speculators.cli", "run", "smoke", "--runs", str(fresh.runs), "--nproc", "2"]
    command += flags(servers, "benchmark.live_prompts=1", "data.server.retries=1")
    environment = {**os.environ, "SPECULATORS_CACHE": str(fresh.cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (folder,) = fresh.runs.iterdir()
    assert losses(folder) == pytest.approx(losses(run_folder)[:8], rel=1e-4)
    assert all(server.requests for server in servers)
    assert list(servers[1].folder.iterdir()) == []
