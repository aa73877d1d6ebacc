"""Answers from a server: requests for the verifier's own distribution, and what survives a failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from fake_vllm import Answers, FakeServer

from speculators.errors import ServerError
from speculators.events import ProgressEvent
from speculators.recipe.token_filter import TokenFilter
from speculators.servers.answers import AnswerClient
from speculators.servers.endpoint import Endpoint, Retry
from speculators.verifier.generate import Sampling
from speculators.verifier.tiny import make_byte_tokenizer

PROMPTS = [[7, 8, 9], [5], [7, 8], [6], [5]]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.7, seed=3, batch_size=2)


def echo(body: dict[str, Any]) -> dict[str, Any]:
    return {"text": "echo", "token_ids": [token + 1 for token in body["prompt"]]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path, answers=echo) as running:
        yield running


def client(server: FakeServer, concurrency: int = 2) -> AnswerClient:
    endpoint = Endpoint(url=server.url, retry=Retry(times=1, first_seconds=0.001))
    tokenizer = make_byte_tokenizer(320)
    return AnswerClient(
        endpoint=endpoint, model="the-model", tokenizer=tokenizer, stop_ids=(2, 0), concurrency=concurrency
    )


def answers_of(server: FakeServer, **options: Any) -> dict[int, Any]:
    answers: dict[int, Any] = {}
    for indices, outputs in client(server).generate_batches(PROMPTS, SAMPLING, **options):
        assert len(indices) <= SAMPLING.batch_size
        answers.update(zip(indices, outputs, strict=True))
    return answers


def test_every_prompt_gets_its_answer(server: FakeServer) -> None:
    """The answers are token ids, under the index of their prompt."""
    assert answers_of(server) == {index: [token + 1 for token in prompt] for index, prompt in enumerate(PROMPTS)}


def test_requests_ask_for_the_pure_distribution(server: FakeServer) -> None:
    """Otherwise the model's generation_config.json decides (some set top_k = 20 and penalties)."""
    answers_of(server)
    for body in server.requests:
        assert (body["temperature"], body["max_tokens"], body["stop_token_ids"]) == (0.7, 12, [2, 0])
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)


def test_requests_carry_the_filter(server: FakeServer) -> None:
    """What the recipe restricts replaces the neutral value; the rest stays neutral."""
    sampling = attrs.evolve(SAMPLING, token_filter=TokenFilter(top_p=0.9, top_k=20))
    list(client(server).generate_batches(PROMPTS, sampling))
    assert {(body["top_p"], body["top_k"], body["min_p"]) for body in server.requests} == {(0.9, 20, 0.0)}


def test_seeds_follow_the_prompts_and_not_their_order(server: FakeServer) -> None:
    """The same prompts in another order get the same seeds; the same prompt twice gets two seeds."""
    answers_of(server)
    first = sorted((body["prompt"], body["seed"]) for body in server.requests)
    server.requests.clear()
    list(client(server).generate_batches(PROMPTS[::-1], SAMPLING))
    assert sorted((body["prompt"], body["seed"]) for body in server.requests) == first
    assert len({seed for _, seed in first}) == len(PROMPTS)


def says(text: str, tokens: int | None, **choice: Any) -> Answers:
    """A server that returns text alone, and perhaps the number of its tokens."""
    return lambda body: {"text": text, "usage": {"completion_tokens": tokens}, "finish_reason": "stop", **choice}


def test_a_server_without_ids_gives_those_of_its_whole_text(server: FakeServer) -> None:
    """Servers such as SGLang return text: special tokens are asked for, and the token that ended it is appended."""
    whole = client(server).tokenizer("two<|im_start|>", add_special_tokens=False)["input_ids"]
    for end, named in ((2, {}), (0, {"matched_stop": 0}), (0, {"stop_reason": 0})):
        server.answers = says("two<|im_start|>", len(whole) + 1, **named)
        assert answers_of(server)[0] == [*whole, end]
    server.answers = says("two<|im_start|>", len(whole), finish_reason="length")
    assert answers_of(server)[0] == whole
    assert all(body["skip_special_tokens"] is False for body in server.requests)


def test_one_trial_answer_tells_whether_the_ids_can_be_trusted(server: FakeServer) -> None:
    """A server that returns ids, or text with as many tokens as were written, is used; nothing else is spent."""
    assert client(server).try_answer([7, 8])
    server.answers = says("ab", 3)
    assert not client(server).try_answer([7, 8])
    assert [body["temperature"] for body in server.requests] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "message"), [(7, "has 3 tokens, where the verifier wrote 7"), (None, "without the number")]
)
def test_text_that_hides_what_was_written_is_refused_before_anything_is_generated(
    server: FakeServer, tokens: int | None, message: str
) -> None:
    """Special tokens that a server leaves out would be missing from the training data, silently."""
    server.answers = says("ab", tokens)
    with pytest.raises(ServerError, match=f"{message}(.|\n)*return"):
        client(server).try_answer([7, 8])


def test_answers_whose_text_can_be_tokenized_in_several_ways_are_counted(server: FakeServer) -> None:
    """A sampled answer may be segmented otherwise than its text: the number of such answers is reported."""
    server.answers = says("ab", 4)
    one = client(server)
    list(one.generate_batches(PROMPTS, SAMPLING))
    assert one.answered == {"text": len(PROMPTS), "differing": len(PROMPTS)}


def test_finished_prompts_are_not_sent_again(server: FakeServer) -> None:
    """A resumed run sends the rest with unchanged seeds; progress counts all prompts."""
    answers_of(server)
    seeds = {tuple(body["prompt"]): body["seed"] for body in server.requests if body["prompt"] != [5]}
    server.requests.clear()
    events: list[ProgressEvent] = []
    assert answers_of(server, done={1, 3, 4}, progress=events.append).keys() == {0, 2}
    assert {tuple(body["prompt"]): body["seed"] for body in server.requests} == {
        prompt: seed for prompt, seed in seeds.items() if prompt in ((7, 8, 9), (7, 8))
    }
    assert [event.done for event in events] == [4, 5]


def test_a_failure_leaves_what_came_before_it(server: FakeServer) -> None:
    """Finished answers are yielded before the server's error is raised."""
    server.faults.extend(["", "", "", "500", "500"])
    finished: list[int] = []
    work = client(server, concurrency=1).generate_batches(PROMPTS, SAMPLING)
    with pytest.raises(ServerError, match="EngineCore"):
        finished.extend(index for indices, _ in work for index in indices)
    assert len(finished) == 3


def test_a_server_of_hidden_states_is_refused(server: FakeServer) -> None:
    """Each answer would leave a file of states that nobody removes."""
    server.states = lambda ids: torch.zeros(len(ids), 1, 2)
    with pytest.raises(
        ServerError, match="returns hidden states with its answers\nuse a server started by plain vllm serve"
    ):
        answers_of(server)


def test_an_answer_to_another_prompt_is_refused(server: FakeServer) -> None:
    """A server that changes the prompt, for example by adding a token, answers another question."""
    server.answers = lambda body: {"text": "a", "prompt_token_ids": [1, *body["prompt"]]}
    with pytest.raises(ServerError, match="answered a prompt that differs"):
        answers_of(server)
    server.answers = lambda body: {"text": None}
    with pytest.raises(ServerError, match=r"no choices\[0\]\.text"):
        answers_of(server)
