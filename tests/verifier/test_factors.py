"""longrope has two sets of factors; a conversation gets those of its own length, whoever shares its batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from verifier.families import LONGROPE, SHAPE

from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier
from speculators.verifier.engine import Engine
from speculators.verifier.factors import factors_for, short_length
from speculators.verifier.generate import Sampling, generate_batches
from speculators.verifier.tiny import make_tiny_verifier

SWITCH = 20
STOP = 95


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A tiny Phi-3 whose long factors begin after 20 tokens."""
    rope = {**LONGROPE, "original_max_position_embeddings": SWITCH}
    folder = tmp_path_factory.mktemp("phi3") / "v"
    values = {**SHAPE, "rope_parameters": rope, "original_max_position_embeddings": SWITCH}
    return Engine(make_tiny_verifier(folder, model_type="phi3", **values))


def states(engine: Engine, row: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return engine.model(input_ids=row[None], output_hidden_states=True).hidden_states[2][0]


def test_states_do_not_depend_on_neighbours(engine: Engine) -> None:
    """Beside a longer conversation, a short one has the states that transformers gives it alone; so has the long."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 96, (size,), generator=generator) for size in (9, SWITCH, SWITCH + 1, 33)]
    captured = engine.capture(rows, (2,))
    for row, (own, _) in zip(rows, captured, strict=True):
        alone = states(engine, row)
        assert (own - alone).abs().max() < 1e-5 * alone.abs().max()
    # The test can fail: with the other factors the states differ.
    with factors_for(engine.model, SWITCH + 1):
        assert (states(engine, rows[0]) - captured[0][0]).abs().max() > 0.1 * captured[0][0].abs().max()


def test_a_length_that_could_be_reached_decides_for_an_answer_being_written(engine: Engine) -> None:
    """Generation and live decoding use the factors of prompt and longest answer, and capture can do the same."""
    assert short_length(engine.model) == SWITCH
    prompts, new = [[3, 50, 7, 21], [9, 8]], 24
    short, long = generate(engine, prompts, 8), generate(engine, prompts, new)
    for prompt, few, many in zip(prompts, short, long, strict=True):
        for answer, limit in ((few, 8), (many, new)):
            options = {"max_new_tokens": limit, "stop_ids": {STOP}}
            lived = decode(CachedVerifier(engine.model), None, torch.tensor(prompt), **options)
            assert list(lived.tokens) == answer
            row = torch.tensor(prompt + answer)
            ((own, _),) = engine.capture([row], (engine.num_layers,), longest=[len(prompt) + limit])
            head = engine.model.lm_head(engine.model.model.norm(own))
            assert head[len(prompt) - 1 : -1].argmax(-1).tolist() == answer
    assert [many[:8] for many in long] != short


def generate(engine: Engine, prompts: list[list[int]], new: int) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in prompts]
    for indices, outputs in generate_batches(engine.model, prompts, Sampling(max_new_tokens=new), [STOP]):
        for index, output in zip(indices, outputs, strict=True):
            answers[index] = output
    return answers


def test_factors_are_restored(engine: Engine) -> None:
    """After a long conversation, also one that failed, a short one has its own states again."""
    row = torch.arange(3, 12)
    before = states(engine, row)
    with pytest.raises(IndexError), factors_for(engine.model, 100):
        states(engine, row + 1000)
    assert torch.equal(states(engine, row), before)


def test_other_models_have_one_set_of_factors(tiny_verifier: Path) -> None:
    """Nothing is grouped or changed without longrope."""
    assert short_length(Engine(tiny_verifier).model) is None
