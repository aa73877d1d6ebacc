"""Answers of a server: what it is asked, so that they are the verifier's own, and what is kept when it fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeServer

from speculators.errors import ServerError
from speculators.events import ProgressEvent
from speculators.servers.answers import AnswerClient
from speculators.servers.endpoint import Endpoint, Retry
from speculators.verifier.generate import Sampling

PROMPTS = [[7, 8, 9], [5], [7, 8], [6], [5]]
SAMPLING = Sampling(max_new_tokens=12, temperature=0.7, seed=3, batch_size=2)


def echo(body: dict[str, Any]) -> dict[str, Any]:
    return {"text": "said", "token_ids": [token + 1 for token in body["prompt"]]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path, answers=echo) as running:
        yield running


def answers(server: FakeServer, concurrency: int = 2) -> AnswerClient:
    endpoint = Endpoint(url=server.url, retry=Retry(times=1, first_seconds=0.001))
    return AnswerClient(endpoint=endpoint, model="the-model", tokenizer=None, stop_ids=(2, 0), concurrency=concurrency)


def asked(server: FakeServer, **keys: Any) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for indices, outputs in answers(server).generate_batches(PROMPTS, SAMPLING, **keys):
        assert len(indices) <= SAMPLING.batch_size
        found.update(zip(indices, outputs, strict=True))
    return found


def test_every_prompt_gets_its_answer(server: FakeServer) -> None:
    """By its place, in ids."""
    assert asked(server) == {index: [token + 1 for token in prompt] for index, prompt in enumerate(PROMPTS)}


def test_the_pure_distribution_is_asked_for(server: FakeServer) -> None:
    """A server's defaults come from the model's generation_config.json (top_k = 20 and penalties, for some)."""
    asked(server)
    for body in server.requests:
        assert (body["temperature"], body["max_tokens"], body["stop_token_ids"]) == (0.7, 12, [2, 0])
        assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)


def test_seeds_follow_the_prompts_and_not_their_order(server: FakeServer) -> None:
    """The same prompts in another order are sampled alike; the same prompt twice is sampled anew."""
    asked(server)
    first = sorted((body["prompt"], body["seed"]) for body in server.requests)
    server.requests.clear()
    list(answers(server).generate_batches(PROMPTS[::-1], SAMPLING))
    assert sorted((body["prompt"], body["seed"]) for body in server.requests) == first
    assert len({seed for _, seed in first}) == len(PROMPTS)


def test_a_server_without_ids_gives_text(server: FakeServer) -> None:
    """SGLang and others: the text is the answer."""
    server.answers = lambda body: {"text": f"said {len(body['prompt'])}"}
    assert asked(server)[0] == "said 3"


def test_what_is_done_is_not_asked_again(server: FakeServer) -> None:
    """A run that goes on asks for the rest, with the seeds that it would have had; progress counts all."""
    asked(server)
    seeds = {tuple(body["prompt"]): body["seed"] for body in server.requests if body["prompt"] != [5]}
    server.requests.clear()
    told: list[ProgressEvent] = []
    assert asked(server, done={1, 3, 4}, progress=told.append).keys() == {0, 2}
    assert {tuple(body["prompt"]): body["seed"] for body in server.requests} == {
        prompt: seed for prompt, seed in seeds.items() if prompt in ((7, 8, 9), (7, 8))
    }
    assert [event.done for event in told] == [4, 5]


def test_a_failure_leaves_what_came_before_it(server: FakeServer) -> None:
    """Answers that are there are yielded before the server's words are raised."""
    server.faults.extend(["", "", "", "500", "500"])
    found: list[int] = []
    work = answers(server, concurrency=1).generate_batches(PROMPTS, SAMPLING)
    with pytest.raises(ServerError, match="EngineCore"):
        found.extend(index for indices, _ in work for index in indices)
    assert len(found) == 3


def test_a_server_of_states_is_not_for_answers(server: FakeServer) -> None:
    """Each answer would leave a file of states that nobody removes."""
    server.states = lambda ids: torch.zeros(len(ids), 1, 2)
    with pytest.raises(ServerError, match="gives hidden states with its answers\nask one of plain vllm serve"):
        asked(server)


def test_an_answer_to_something_else_is_refused(server: FakeServer) -> None:
    """A server that changes the prompt (adds a token in front, say) answers another question."""
    server.answers = lambda body: {"text": "a", "prompt_token_ids": [1, *body["prompt"]]}
    with pytest.raises(ServerError, match="answered another prompt"):
        asked(server)
    server.answers = lambda body: {"text": None}
    with pytest.raises(ServerError, match=r"no choices\[0\]\.text"):
        asked(server)
