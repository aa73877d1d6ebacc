"""A benchmark on a running server: its own counters, its measure_speed, and what is refused rather than believed."""

from __future__ import annotations

import attrs
import pytest
from fake_server import FakeServer, K, served

from speculators.bench.suites import Prompt
from speculators.data.conversations import Message
from speculators.data.template import ChatTemplate
from speculators.errors import ServerError
from speculators.servers.benchmark import Workload, Server, benchmark_server
from speculators.servers.counters import read_counters, parse_prometheus
from speculators.servers.engines import ENGINES
from speculators.servers.endpoint import Endpoint, Retry
from speculators.servers.load import Spread, measure_speed
from speculators.servers.streaming import Completion, read_stream
from speculators.verifier.tokens import load_tokenizer

TOKENS = 12
# An answer of 12 tokens by the pattern 2, 0, 3, 1: the prefill's one, then rounds of 3, 1, 4, 2 and the last of 1.
ROUNDS = 5


@pytest.fixture(scope="module")
def questions(tiny_verifier):
    """Three prompts, the last with a second turn: four answers."""
    prompts = [
        Prompt(id=str(number), category="", messages=(Message("user", f"question {number}"),), later=later)
        for number, later in enumerate(((), (), ("and then",)))
    ]
    return Workload(
        suite="mine",
        prompts=prompts,
        suite_digest="d",
        template=ChatTemplate.of(load_tokenizer(tiny_verifier)),
        max_new_tokens=TOKENS,
        stop_ids=(7,),
        seed=3,
        concurrency=2,
        num_speculative_tokens=None,
    )


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr("speculators.servers.counters.SETTLE_SECONDS", 0.01)


def _server(fake: FakeServer) -> Server:
    return Server.find(fake.engine, Endpoint(url=fake.url, retry=Retry(first_seconds=0.01)), None)


def _measure(fake, questions, *, baseline=None, temperature=0.0, **more):
    with served(fake):
        return benchmark_server(_server(fake), baseline, attrs.evolve(questions, **more), temperature)


def test_acceptance_is_the_difference_of_the_servers_counters(questions):
    """The warm-up before is not in it; tau counts as in process: tokens of rounds over rounds."""
    setting = _measure(FakeServer(), questions)
    acceptance = setting.acceptance
    assert (acceptance.prompts, acceptance.responses) == (3, 4)
    assert (acceptance.tokens, acceptance.rounds) == (4 * (TOKENS - 1), 4 * ROUNDS)
    assert acceptance.tau == (TOKENS - 1) / ROUNDS
    assert acceptance.drafted == K
    # The last round's drafts were accepted, too, though they are past the end: so the server counts.
    assert acceptance.by_position == (4 / 5, 3 / 5, 1 / 5)
    assert setting.num_speculative_tokens == K
    assert "vllm 1.2.3" in setting.definition
    assert "K=3, T=0" in setting.definition


def test_rounds_of_each_prompt_are_told_where_the_stream_shows_them_all(questions):
    """Pieces of the answers add up to the counted rounds: then there is an interval over prompts."""
    setting = _measure(FakeServer(), questions)
    assert setting.by_prompt == {"0": (11.0, 5.0), "1": (11.0, 5.0), "2": (22.0, 10.0)}
    assert setting.acceptance.tau_interval == pytest.approx((2.2, 2.2))
    silent = _measure(FakeServer(tells=False), questions)
    assert silent.by_prompt is None
    assert silent.acceptance.tau_interval is None
    assert silent.acceptance.tau == 2.2
    assert silent.pace.inter_token is None


def test_rounds_without_a_draft_are_rounds(questions):
    """A server that drafts in some steps only must not look better for it."""
    setting = _measure(FakeServer(undrafted=2), questions)
    assert setting.acceptance.rounds == 4 * ROUNDS
    assert setting.acceptance.undrafted == 4 * 2
    assert setting.acceptance.tau == 2.2


def test_requests_carry_tokens_and_everything_that_decides_the_answer(questions):
    """Token ids, not text: no template of the server's between; its own answer leads to the next turn."""
    fake = FakeServer()
    _measure(fake, questions, concurrency=1, temperature=0.5)
    warm_up, *asked = fake.requests
    template = questions.template
    assert asked[0]["prompt"] == template.prompt_ids(questions.prompts[0].messages)
    assert warm_up["prompt"] == asked[0]["prompt"][::-1]
    assert {key: asked[0][key] for key in ("max_tokens", "temperature", "stop_token_ids", "stream")} == {
        "max_tokens": TOKENS,
        "temperature": 0.5,
        "stop_token_ids": [7],
        "stream": True,
    }
    # What is not told, a server takes from generation_config.json: other answers than those that replay is over.
    assert (asked[0]["top_p"], asked[0]["top_k"], asked[0]["repetition_penalty"]) == (1.0, -1, 1.0)
    assert len({request["seed"] for request in asked}) == 4
    (messages, (later,)) = questions.prompts[2].messages, questions.prompts[2].later
    second = (*messages, Message("assistant", "ab" * TOKENS), Message("user", later))
    assert asked[-1]["prompt"] == template.prompt_ids(second)


def test_sglang_counts_rounds_and_not_positions(questions):
    """Its K must be told; a server that has only the gauge of a moment is refused with what to do."""
    fake = FakeServer(engine="sglang")
    setting = _measure(fake, questions, num_speculative_tokens=3)
    assert setting.acceptance.tau == 2.2
    assert (setting.acceptance.by_position, setting.acceptance.drafted) == ((), None)
    with pytest.raises(ServerError, match="--k K does"):
        _measure(FakeServer(engine="sglang"), questions)
    with pytest.raises(ServerError, match="spec_accept_length is a mean over the last moments"):
        _measure(FakeServer(engine="sglang", drafts=False), questions, num_speculative_tokens=3)


def test_the_speed_up_is_against_a_server_that_does_not_draft(questions):
    """More than tau is flagged; a baseline that drafts is none."""
    plain = FakeServer(drafts=False)
    with served(plain):
        setting = _measure(FakeServer(), questions, baseline=_server(plain))
        assert setting.speed_up == setting.pace.tokens_per_second / setting.baseline.tokens_per_second
        assert setting.unmatched_baseline == (setting.speed_up > 2.2)
        assert setting.baseline.requests == setting.pace.requests == 4
    with served(FakeServer()) as drafting, pytest.raises(ServerError, match="it is no baseline"):
        _measure(FakeServer(), questions, baseline=_server(drafting))


def test_a_busy_server_is_asked_again_and_the_result_says_so(questions):
    """What passes is waited for; what does not is told in the server's own words."""
    setting = _measure(FakeServer(busy=2), questions, concurrency=1)
    assert setting.pace.repeated == 0  # it was the warm-up
    with served(FakeServer()) as fake:
        other = attrs.evolve(_server(fake), model="other")
        with pytest.raises(ServerError, match="The model `other` does not exist"):
            benchmark_server(other, None, questions, 0.0)
    with pytest.raises(ServerError, match="connection refused"):
        Server.find("vllm", Endpoint(url=fake.url, retry=Retry(times=1, first_seconds=0.01)), None)


def test_foreign_requests_spoil_the_counters_and_are_noticed(questions):
    """More tokens were generated than the answers have: somebody else's rounds are among those counted."""
    with pytest.raises(ServerError, match="counts 52 tokens, its answers have 48: others use it, too"):
        _measure(FakeServer(foreign=1), questions)


def test_a_server_that_drafts_another_k_or_nothing_is_refused(questions):
    """What was told must be what is served."""
    with pytest.raises(ServerError, match="drafts 3 tokens a round, --k says 5"):
        _measure(FakeServer(), questions, num_speculative_tokens=5)
    with pytest.raises(ServerError, match="does not draft, or does not tell"):
        _measure(FakeServer(drafts=False), questions)
    with served(FakeServer(engine="sglang")) as fake:
        strange = attrs.evolve(_server(fake), engine=ENGINES["vllm"])
        with pytest.raises(ServerError, match="is this a server of vllm"):
            benchmark_server(strange, None, questions, 0.0)
        with pytest.raises(ServerError, match=r"offers the models \['fake'\]"):
            Server.find("vllm", Endpoint(url=fake.url), "other")


def test_prometheus_text_is_summed_over_all_labels_but_the_position():
    """Several engines or ranks of one server are one; comments and what else stands there is passed over."""
    text = 'a_total{rank="0"} 1.0\na_total{rank="1"} 2.0 1700000\n# TYPE b gauge\nb 1e3\nc{position="1",x="} y"} 4\nno'
    assert parse_prometheus(text) == {"a": {"": 3.0}, "b": {"": 1000.0}, "c": {"1": 4.0}}
    told = FakeServer(rounds=2, generated=9, by_position=[2, 1, 0]).metrics()
    counted = read_counters(ENGINES["vllm"], told, speculates=True)
    assert (counted.generated, counted.rounds, counted.drafted, counted.by_position) == (9, 2, 6, (2, 1, 0))
    with pytest.raises(ServerError, match="went back"):
        attrs.evolve(counted, rounds=1).since(counted)


def test_inter_token_latency_shares_the_wait_for_a_piece_among_its_tokens():
    """Two tokens that come together after 0.2 s took 0.1 s each; first tokens are counted apart."""
    answer = Completion(text="", tokens=4, seconds=0.9, arrivals=((0.5, 1), (0.7, 3), (0.9, 4)))
    told = measure_speed([answer], 1.0)
    assert told.tokens_per_second == 4.0
    assert told.first_token.mean == 0.5
    assert told.inter_token == Spread(mean=pytest.approx(0.4 / 3), p50=pytest.approx(0.1), p95=pytest.approx(0.2))
    assert measure_speed([attrs.evolve(answer, arrivals=())], 1.0).inter_token is None


@pytest.mark.parametrize(
    ("lines", "words", "passes"),
    [
        ([b"data: {not json", b"data: [DONE]"], "streams what is not JSON", False),
        ([b'data: {"error": {"message": "out of memory"}}'], "broke off an answer: out of memory", False),
        ([b"data: [1, 2]", b"data: [DONE]"], "streams what is no event", False),
        ([b'data: "an error"', b"data: [DONE]"], "streams what is no event", False),
        ([b'data: {"choices": [{"text": "a"}]}'], "ended before its", True),
    ],
)
def test_a_broken_stream_is_no_answer(lines, words, passes):
    """What comes before the break is thrown away; only a connection that ended may succeed another time."""
    with pytest.raises(ServerError, match=words) as caught:
        read_stream(lines, 0.0, "here")
    assert caught.value.passes is passes


def test_an_error_of_null_is_none():
    """Some servers have the field in every event."""
    lines = [b'data: {"error": null, "choices": [{"text": "a"}]}', b"data: [DONE]"]
    assert read_stream(lines, 0.0, "here").text == "a"
