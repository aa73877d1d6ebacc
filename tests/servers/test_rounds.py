"""The rounds of a server's answers, from its own report or from the chunks of its streams."""

from __future__ import annotations

import pytest
from fake_server import FakeServer, K, served, workload_of

from speculators.bench.suites import Prompt
from speculators.data.messages import Message
from speculators.errors import ServerError
from speculators.servers.benchmark import Server
from speculators.servers.endpoint import Endpoint, Retry
from speculators.servers.rounds import place_rounds, served_answers

TOKENS = 12
# By the pattern 2, 0, 3, 1, 2: the last round has room for one token.
ROUNDS = ((0, 2), (3, 0), (4, 3), (8, 1), (10, 1))


@pytest.fixture(scope="module")
def workload(tiny_verifier):
    """Two prompts, one with a system turn and one with a second turn: three answers."""
    system = (Message("system", "be short"), Message("user", "question 0"))
    prompts = [
        Prompt(id="0", category="a", messages=system),
        Prompt(id="1", category="b", messages=(Message("user", "question 1"),), later=("and then",)),
    ]
    return workload_of(tiny_verifier, prompts, max_new_tokens=TOKENS)


@pytest.fixture(autouse=True)
def _settle_quickly(monkeypatch):
    monkeypatch.setattr("speculators.servers.counters.SETTLE_SECONDS", 0.01)


def _ask(fake, workload, **options):
    with served(fake):
        server = Server.find(fake.engine, Endpoint(url=fake.url, retry=Retry(first_seconds=0.01)), None)
        return served_answers(server, workload, **options)


@pytest.mark.parametrize("details", [True, False])
def test_rounds_are_as_reported_or_one_for_each_chunk(workload, details):
    """Both give the same rounds but for the last, whose chunk does not say whether its last token was drafted."""
    served_suite = _ask(FakeServer(details=details), workload)
    assert served_suite.num_speculative_tokens == K
    assert served_suite.source.startswith("metrics" if details else "chunks")
    assert [(a.response.id, a.turn, a.has_system) for a in served_suite.answers] == [
        ("0", 0, True),
        ("1", 0, False),
        ("1", 1, False),
    ]
    for answer in served_suite.answers:
        assert answer.rounds[:-1] == ROUNDS[:-1]
        assert (answer.rounds[-1], answer.open_end) == ((ROUNDS[-1], False) if details else ((10, 0), True))
        assert answer.response.answer == tuple(range(TOKENS))
        assert answer.response.prompt


def test_a_report_does_not_need_the_servers_counters(workload):
    """vLLM started with --disable-log-stats counts nothing, and still reports the rounds of each request."""
    fake = FakeServer(details=True, joins=True, foreign=100)
    assert all(answer.rounds == ROUNDS for answer in _ask(fake, workload).answers)


def test_joined_chunks_are_refused_with_the_option_that_helps(workload):
    """A chunk of two rounds does not say which of them accepted what."""
    with pytest.raises(ServerError, match="sent 12 chunks for 15: which of them accepted what is unknown") as caught:
        _ask(FakeServer(joins=True), workload)
    assert "--per-request-spec-decode-metrics detailed" in caught.value.hint


def test_another_k_than_the_servers_is_refused(workload):
    """The user's K must be that of the server."""
    with pytest.raises(ServerError, match="the server drafts 3 tokens per round, but --k is 5"):
        _ask(FakeServer(details=True), workload, num_speculative_tokens=5)


@pytest.mark.parametrize("counts_chunks", [True, False])
def test_rounds_that_do_not_make_the_answer_are_refused(workload, counts_chunks):
    """Neither rounds without a draft, which a report leaves out, nor answers without ids can be replayed."""

    class Lossy(FakeServer):
        def report(self, accepted):
            return super().report(accepted[:-1])

    fault = "4 rounds with 6 accepted drafts do not make 12" if counts_chunks else "lists the ids of 0 of its 12 tokens"
    with pytest.raises(ServerError, match=fault):
        _ask(Lossy(details=True, counts_chunks=counts_chunks), workload)


@pytest.mark.parametrize(
    ("accepted", "tokens", "rounds"),
    [
        ((), 0, []),
        ((), 1, []),
        ((3,), 5, [(0, 3)]),
        ((3,), 3, [(0, 2)]),
        ((0, 1), 4, [(0, 0), (1, 1)]),
        ((0, 1), 5, None),
        ((3, 0), 5, None),
    ],
)
def test_anchors_follow_from_what_was_accepted(accepted, tokens, rounds):
    """The first token belongs to no round; each round moves on by its accepted drafts and one."""
    assert place_rounds(accepted, tokens) == rounds
