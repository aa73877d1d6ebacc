"""Benchmarks of a running server: its counters, its speed, and the results that are refused."""

from __future__ import annotations

import attrs
import pytest
from fake_server import FakeServer, K, served, workload_of

from speculators.bench.suites import Prompt
from speculators.data.messages import Message
from speculators.errors import ServerError
from speculators.recipe.token_filter import TokenFilter
from speculators.servers.benchmark import Server, benchmark_server
from speculators.servers.counters import parse_prometheus, read_counters
from speculators.servers.endpoint import Endpoint, Retry
from speculators.servers.engines import ENGINES
from speculators.servers.load import Spread, measure_speed
from speculators.servers.streaming import Completion, read_stream

TOKENS = 12
# An answer of 12 tokens by the pattern 2, 0, 3, 1: one from the prefill, then rounds of 3, 1, 4, 2 and 1 tokens.
ROUNDS = 5


@pytest.fixture(scope="module")
def workload(tiny_verifier):
    """Three prompts, the last with a second turn: four answers."""
    prompts = [
        Prompt(id=str(number), category="", messages=(Message("user", f"question {number}"),), later=later)
        for number, later in enumerate(((), (), ("and then",)))
    ]
    return workload_of(tiny_verifier, prompts, max_new_tokens=TOKENS)


@pytest.fixture(autouse=True)
def _settle_quickly(monkeypatch):
    monkeypatch.setattr("speculators.servers.counters.SETTLE_SECONDS", 0.01)


def _server(fake: FakeServer) -> Server:
    return Server.find(fake.engine, Endpoint(url=fake.url, retry=Retry(first_seconds=0.01)), None)


def _measure(fake, workload, *, baseline=None, num_speculative_tokens=None, **changes):
    with served(fake):
        changed = attrs.evolve(workload, **changes)
        return benchmark_server(_server(fake), baseline, changed, num_speculative_tokens=num_speculative_tokens)


def test_acceptance_is_the_difference_of_the_servers_counters(workload):
    """It excludes the warm-up; tau is tokens of rounds over rounds, as in process."""
    setting = _measure(FakeServer(), workload)
    acceptance = setting.acceptance
    assert (acceptance.prompts, acceptance.responses) == (3, 4)
    assert (acceptance.tokens, acceptance.rounds) == (4 * (TOKENS - 1), 4 * ROUNDS)
    assert acceptance.tau == (TOKENS - 1) / ROUNDS
    assert acceptance.drafted == K
    # The server also counts the last round's accepted drafts past the end of the answer.
    assert acceptance.by_position == (4 / 5, 3 / 5, 1 / 5)
    assert setting.num_speculative_tokens == K
    assert "vllm 1.2.3" in setting.definition
    assert "K=3, T=0" in setting.definition


def test_rounds_of_each_prompt_are_known_if_the_stream_shows_them_all(workload):
    """If the chunks of all answers add up to the counted rounds, there is an interval over prompts."""
    setting = _measure(FakeServer(), workload)
    assert setting.by_prompt == {"0": (11.0, 5.0), "1": (11.0, 5.0), "2": (22.0, 10.0)}
    assert setting.acceptance.tau_interval == pytest.approx((2.2, 2.2))
    silent = _measure(FakeServer(counts_chunks=False), workload)
    assert silent.by_prompt is None
    assert silent.acceptance.tau_interval is None
    assert silent.acceptance.tau == 2.2
    assert silent.pace.inter_token is None


def test_rounds_without_a_draft_are_rounds(workload):
    """A server that drafts in some steps only must not look better than it is."""
    setting = _measure(FakeServer(undrafted=2), workload)
    assert setting.acceptance.rounds == 4 * ROUNDS
    assert setting.acceptance.undrafted == 4 * 2
    assert setting.acceptance.tau == 2.2


def test_a_filter_is_requested_and_stands_in_the_definition(workload):
    """The server samples from the tokens of the recipe, and the number says so."""
    fake = FakeServer()
    setting = _measure(fake, workload, temperature=0.5, token_filter=TokenFilter(min_p=0.1))
    assert {request["min_p"] for request in fake.requests} == {0.1}
    assert "T=0.5, the verifier's min_p=0.1;" in setting.definition


def test_requests_carry_token_ids_and_all_sampling_options(workload):
    """Token ids bypass the server's template; the server's own answer precedes the next turn."""
    fake = FakeServer()
    _measure(fake, workload, concurrency=1, temperature=0.5)
    warm_up, *requests = fake.requests
    template = workload.template
    assert requests[0]["prompt"] == template.prompt_ids(workload.prompts[0].messages)
    assert warm_up["prompt"] == requests[0]["prompt"][::-1]
    assert {key: requests[0][key] for key in ("max_tokens", "temperature", "stop_token_ids", "stream")} == {
        "max_tokens": TOKENS,
        "temperature": 0.5,
        "stop_token_ids": [7],
        "stream": True,
    }
    # A server takes missing options from generation_config.json, which gives other answers than the replayed ones.
    assert (requests[0]["top_p"], requests[0]["top_k"], requests[0]["repetition_penalty"]) == (1.0, -1, 1.0)
    assert len({request["seed"] for request in requests}) == 4
    (messages, (later,)) = workload.prompts[2].messages, workload.prompts[2].later
    second = (*messages, Message("assistant", "ab" * TOKENS), Message("user", later))
    assert requests[-1]["prompt"] == template.prompt_ids(second)


def test_sglang_counts_rounds_and_not_positions(workload):
    """The user must give K; a server that has only the gauge is refused with a remedy."""
    fake = FakeServer(engine="sglang")
    setting = _measure(fake, workload, num_speculative_tokens=3)
    assert setting.acceptance.tau == 2.2
    assert (setting.acceptance.by_position, setting.acceptance.drafted) == ((), None)
    with pytest.raises(ServerError, match="give --k K"):
        _measure(FakeServer(engine="sglang"), workload)
    with pytest.raises(ServerError, match="spec_accept_length is a short moving average"):
        _measure(FakeServer(engine="sglang", drafts=False), workload, num_speculative_tokens=3)


def test_the_speed_up_is_against_a_server_that_does_not_draft(workload):
    """A speed-up above tau is flagged; a baseline that drafts is refused."""
    plain = FakeServer(drafts=False)
    with served(plain):
        setting = _measure(FakeServer(), workload, baseline=_server(plain))
        assert setting.speed_up == setting.pace.tokens_per_second / setting.baseline.tokens_per_second
        assert setting.unmatched_baseline == (setting.speed_up > 2.2)
        assert setting.baseline.requests == setting.pace.requests == 4
    with served(FakeServer()) as drafting, pytest.raises(ServerError, match="cannot be the baseline"):
        _measure(FakeServer(), workload, baseline=_server(drafting))


def test_a_busy_server_gets_the_request_again(workload):
    """Passing failures are retried; others are reported in the server's own words."""
    setting = _measure(FakeServer(busy=2), workload, concurrency=1)
    assert setting.pace.repeated == 0  # the warm-up met the busy server
    with served(FakeServer()) as fake:
        other = attrs.evolve(_server(fake), model="other")
        with pytest.raises(ServerError, match="The model `other` does not exist"):
            benchmark_server(other, None, workload)
    with pytest.raises(ServerError, match="connection refused"):
        Server.find("vllm", Endpoint(url=fake.url, retry=Retry(times=1, first_seconds=0.01)), None)


def test_requests_of_others_are_noticed(workload):
    """If the server generated more tokens than the answers have, the counters include other rounds."""
    with pytest.raises(ServerError, match="counts 52 tokens, but its answers have 48: others use it"):
        _measure(FakeServer(foreign=1), workload)


def test_a_server_that_drafts_another_k_or_nothing_is_refused(workload):
    """The options must match what is served."""
    with pytest.raises(ServerError, match="drafts 3 tokens per round, but --k is 5"):
        _measure(FakeServer(), workload, num_speculative_tokens=5)
    with pytest.raises(ServerError, match="does not draft, or does not count its rounds"):
        _measure(FakeServer(drafts=False), workload)
    with served(FakeServer(engine="sglang")) as fake:
        strange = attrs.evolve(_server(fake), engine=ENGINES["vllm"])
        with pytest.raises(ServerError, match="is this a server of vllm"):
            benchmark_server(strange, None, workload)
        with pytest.raises(ServerError, match=r"offers the models \['fake'\]"):
            Server.find("vllm", Endpoint(url=fake.url), "other")


def test_prometheus_text_is_summed_over_all_labels_but_the_position():
    """Engines and ranks of one server count together; comments and other lines are skipped."""
    text = 'a_total{rank="0"} 1.0\na_total{rank="1"} 2.0 1700000\n# TYPE b gauge\nb 1e3\nc{position="1",x="} y"} 4\nno'
    assert parse_prometheus(text) == {"a": {"": 3.0}, "b": {"": 1000.0}, "c": {"1": 4.0}}
    metrics = FakeServer(rounds=2, generated=9, by_position=[2, 1, 0]).metrics()
    counters = read_counters(ENGINES["vllm"], metrics, speculates=True)
    assert (counters.generated, counters.rounds, counters.drafted, counters.by_position) == (9, 2, 6, (2, 1, 0))
    with pytest.raises(ServerError, match="went backwards"):
        attrs.evolve(counters, rounds=1).since(counters)


def test_inter_token_latency_divides_the_wait_for_a_chunk_among_its_tokens():
    """Two tokens that arrive together after 0.2 s took 0.1 s each; first tokens have their own statistics."""
    answer = Completion(text="", tokens=4, seconds=0.9, arrivals=((0.5, 1), (0.7, 3), (0.9, 4)))
    speed = measure_speed([answer], 1.0)
    assert speed.tokens_per_second == 4.0
    assert speed.first_token.mean == 0.5
    assert speed.inter_token == Spread(mean=pytest.approx(0.4 / 3), p50=pytest.approx(0.1), p95=pytest.approx(0.2))
    assert measure_speed([attrs.evolve(answer, arrivals=())], 1.0).inter_token is None


@pytest.mark.parametrize(
    ("lines", "message", "passes"),
    [
        ([b"data: {not json", b"data: [DONE]"], "streamed something that is not JSON", False),
        ([b'data: {"error": {"message": "out of memory"}}'], "broke off an answer: out of memory", False),
        ([b"data: [1, 2]", b"data: [DONE]"], "streamed JSON that is not an event", False),
        ([b'data: "an error"', b"data: [DONE]"], "streamed JSON that is not an event", False),
        ([b'data: {"choices": [{"text": "a"}]}'], "ended before its", True),
    ],
)
def test_a_broken_stream_is_an_error(lines, message, passes):
    """The part before the break is discarded; only an interrupted connection may succeed later."""
    with pytest.raises(ServerError, match=message) as caught:
        read_stream(lines, 0.0, "here")
    assert caught.value.passes is passes


def test_a_null_error_is_no_error():
    """Some servers send the field in every event."""
    lines = [b'data: {"error": null, "choices": [{"text": "a"}]}', b"data: [DONE]"]
    assert read_stream(lines, 0.0, "here").text == "a"
