"""Answers that the verifier generates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models.test_mtp import HYBRID

from speculators.events import ProgressEvent
from speculators.recipe.token_filter import TokenFilter
from speculators.verifier.engine import Engine
from speculators.verifier.generate import Sampling
from speculators.verifier.tiny import make_tiny_verifier
from speculators.verifier.tokens import end_of_turn, load_tokenizer

NEW = 24


@pytest.fixture(scope="module")
def engine(tiny_verifier: Path) -> Engine:
    return Engine(tiny_verifier)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in (4, 19, 4, 7, 30)]


def greedy(engine: Engine, prompt: list[int], max_new_tokens: int) -> list[int]:
    """Decodes token by token, without a cache, up to and including the first stop token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(engine.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in engine.stop_ids:
            break
    return ids[len(prompt) :]


def test_batched_greedy_equals_token_by_token(engine: Engine, prompts: list[list[int]]):
    """Padding, batching and the cache change no token in float32, and answers come back in the order of the prompts."""
    answers = engine.generate(prompts, max_new_tokens=NEW, batch_size=3)
    assert answers == [greedy(engine, prompt, NEW) for prompt in prompts]


@pytest.mark.parametrize("options", [{}, {"model_type": "qwen3_5_text", **HYBRID}], ids=["attention", "hybrid"])
def test_answers_end_with_the_stop_token(tmp_path: Path, prompts: list[list[int]], options: dict):
    """An answer holds its end-of-turn token and nothing after it; others in the batch go on, with their own states."""
    engine = Engine(make_tiny_verifier(tmp_path, seed=1, **options))
    free = engine.generate(prompts, max_new_tokens=NEW)
    # The third token of the second answer becomes the stop token.
    engine.model.generation_config.eos_token_id = free[1][2]
    answers = engine.generate(prompts, max_new_tokens=NEW)
    for answer, whole in zip(answers, free, strict=True):
        ends = [place for place, token in enumerate(whole) if token in engine.stop_ids]
        assert answer == (whole[: ends[0] + 1] if ends else whole)
    assert len(answers[1]) <= 3
    assert max(map(len, answers)) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_order_of_prompts_does_not_matter(engine: Engine, prompts: list[list[int]], temperature: float):
    """Any order of the same prompts gives each the same answer, sampled ones included."""
    options = {"max_new_tokens": 8, "temperature": temperature, "seed": 7, "batch_size": 2}
    forwards = engine.generate(prompts, **options)
    backwards = engine.generate(prompts[::-1], **options)
    assert forwards == backwards[::-1]


def test_sampling_follows_seed_and_pure_temperature(tmp_path: Path):
    """Samples at T = 2 follow softmax(logits / 2): no top-k or top-p cuts the tail. Same seed, same answers.

    2000 draws over 320 near-equal outcomes lie about sqrt(320 / (2 pi 2000)) = 0.16 in total variation from the exact
    distribution; one cut to its 50 most likely tokens would lie 0.8 away.
    """
    engine = Engine(make_tiny_verifier(tmp_path, initializer_range=0.02))
    prompts = [[5, 6, 7]] * 2000
    options = {"max_new_tokens": 1, "temperature": 2.0, "batch_size": 2000}
    draws = engine.generate(prompts, seed=1, **options)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=320) / 2000
    with torch.no_grad():
        exact = torch.softmax(engine.model(torch.tensor(prompts[:1])).logits[0, -1] / 2.0, -1)
    assert (counts - exact).abs().sum() / 2 < 0.2
    assert draws == engine.generate(prompts, seed=1, **options)
    assert draws != engine.generate(prompts, seed=2, **options)


def test_sampling_keeps_to_the_filter(tmp_path: Path):
    """1000 draws are all among the five most probable tokens, and each of these is drawn."""
    engine = Engine(make_tiny_verifier(tmp_path, initializer_range=0.02))
    prompts = [[5, 6, 7]] * 1000
    options = {"max_new_tokens": 1, "temperature": 2.0, "batch_size": 1000, "seed": 1}
    draws = engine.generate(prompts, token_filter=TokenFilter(top_k=5), **options)
    with torch.no_grad():
        best = engine.model(torch.tensor(prompts[:1])).logits[0, -1].topk(5).indices
    assert {draw for (draw,) in draws} == set(best.tolist())


def test_the_callers_random_numbers_are_left_alone(engine: Engine, prompts: list[list[int]]):
    """Sampling uses its own seed and gives the global generator back as it was."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    engine.generate(prompts[:1], max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.rand(3), expected)


def test_a_resumed_run_gives_the_same_answers(engine: Engine, prompts: list[list[int]]):
    """Finished batches are skipped, and the rest is sampled as if nothing had been interrupted."""
    sampling = Sampling(max_new_tokens=6, temperature=1.0, seed=3, batch_size=2)
    whole = list(engine.generate_batches(prompts, sampling))
    rest = list(engine.generate_batches(prompts, sampling, done=set(whole[0][0])))
    assert rest == whole[1:]
    assert sorted(index for indices, _ in whole for index in indices) == list(range(len(prompts)))


def test_progress_reports_prompts_and_tokens_per_second(engine: Engine, prompts: list[list[int]]):
    """While a batch runs, progress moves with each token and ends at the number of prompts."""
    events: list[ProgressEvent] = []
    engine.generate(prompts, max_new_tokens=6, batch_size=2, progress=events.append)
    assert events[-1].done == events[-1].total == len(prompts)
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert len(events) > 6
    assert all("tokens/s" in event.note for event in events)


def test_the_end_of_turn_comes_from_the_template(tiny_verifier: Path):
    """The template's token after an answer is found; a tokenizer without a template has none."""
    tokenizer = load_tokenizer(tiny_verifier)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == "<|im_end|>"
    tokenizer.chat_template = None
    assert end_of_turn(tokenizer) is None
