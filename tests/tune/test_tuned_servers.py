"""Tuning of running servers: the schedule follows from the loads that were measured, and misuse is refused."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from fake_server import FakeServer, served, workload_of

from speculators.bench.suites import Prompt
from speculators.data.messages import Message
from speculators.errors import ServerError
from speculators.servers.benchmark import Server
from speculators.servers.endpoint import Endpoint
from speculators.servers.load import Workload
from speculators.tune.result import ServedTuning
from speculators.tune.served import tune_servers

# Answers of eight tokens by the pattern 2, 0, 3 take three rounds: tau is 7 / 3.
TOKENS, TAU = 8, 7 / 3
STEP = 0.02


@pytest.fixture(scope="module")
def workload(tiny_verifier):
    """Four prompts."""
    prompts = [Prompt(id=str(n), category="", messages=(Message("user", f"question {n}"),)) for n in range(4)]
    return workload_of(tiny_verifier, prompts, max_new_tokens=TOKENS, concurrency=1)


@pytest.fixture(autouse=True)
def _settle_quickly(monkeypatch):
    monkeypatch.setattr("speculators.servers.counters.SETTLE_SECONDS", 0.01)


def _tune(workload: Workload, *drafting: FakeServer, taus: dict[int, float], limit: int = 4) -> ServedTuning:
    with ExitStack() as stack:
        plainly = FakeServer(drafts=False, step_seconds=_flat)
        fakes = [stack.enter_context(served(fake)) for fake in (*drafting, plainly)]
        *servers, plain = [Server.find("vllm", Endpoint(url=fake.url), None) for fake in fakes]
        return tune_servers(servers, plain, workload, taus, name="run", limit=limit)


def _flat(under_way: int) -> float:
    return STEP


def _crowded(under_way: int) -> float:
    """A server whose rounds take ten times as long from three answers on."""
    return STEP if under_way < 3 else 10 * STEP


def test_drafting_goes_off_where_rounds_become_longer_than_what_they_yield(workload):
    """Up to two answers at once a round of three drafts costs one step, with four at once ten steps: tau is 2.33. The
    steps are long enough for a busy machine not to turn one into the other."""
    tuned = _tune(workload, FakeServer(pattern=(2, 0, 3), step_seconds=_crowded), taus={1: 1.5, 3: TAU})
    assert [point.concurrency for point in tuned.points] == [1, 2, 4]
    assert [point.drafting[0].tau for point in tuned.points] == [pytest.approx(TAU)] * 3
    assert (tuned.schedule[0][0], tuned.schedule[0][2]) == (1, 3)
    assert (tuned.schedule[-1][1], tuned.schedule[-1][2]) == (4, 0)
    assert tuned.off_from == tuned.schedule[-1][0]
    assert tuned.most == 3
    batches = [batch for first, last, _ in tuned.schedule for batch in range(first, last + 1)]
    assert batches == [1, 2, 3, 4]


def test_loads_that_cannot_be_measured_are_refused(workload):
    """Too few prompts, two servers with one K, and a run whose K are all larger than the server's."""
    with pytest.raises(ServerError, match="5 prompts cannot be sent at once: suite mine has 4"):
        _tune(workload, FakeServer(), taus={3: TAU}, limit=5)
    twice = [FakeServer(step_seconds=lambda _: 0.0) for _ in range(2)]
    with pytest.raises(ServerError, match=r"the servers draft \[3, 3\] tokens per round"):
        _tune(workload, *twice, taus={3: TAU}, limit=1)
    with pytest.raises(ServerError, match=r"replay measured no K up to that: \[5\]"):
        _tune(workload, FakeServer(step_seconds=lambda _: 0.0), taus={5: TAU}, limit=1)
