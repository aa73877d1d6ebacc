"""Processes that hold one verifier together compute what one process with a whole copy does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import SERVER
from sharing import LAYER_IDS, MAX_NEW_TOKENS, ROWS, compute, share_of

from speculators.errors import VerifierError
from speculators.facts import VerifierFacts
from speculators.verifier import sharded
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier

# Seven experts cannot be divided evenly among processes.
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A verifier whose head is its embedding, and one with experts and a head of its own."""
    home = tmp_path_factory.mktemp("verifiers")
    return [make_tiny_verifier(home / "tied"), make_tiny_verifier(home / "experts", tie=False, **EXPERTS)]


@pytest.mark.parametrize("size", [2, 4])
def test_states_and_answers_are_those_of_one_process(size: int, folders: list[Path], tmp_path: Path) -> None:
    """Bit for bit, since each forward has the same weights and rows; and no process holds more than its part.

    The processes run different numbers of forwards, and one of them none at all.
    """
    processes = [SERVER.Process(target=compute, args=(rank, size, folders, tmp_path)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * size
    for folder in folders:
        whole, parts = Engine(folder), list[float]()
        for rank in range(size):
            local_share, captured, answers = torch.load(tmp_path / f"{folder.name}-{rank}.pt")
            parts.append(local_share)
            rows = [ROWS[index] for index in share_of(rank)]
            expected = {place: states for place, *states in whole.capture_all(rows, LAYER_IDS, batch_tokens=40)}
            assert captured.keys() == expected.keys() == set(range(rank))
            for place, states in expected.items():
                assert all(map(torch.equal, captured[place], states))
            if rank == 0:
                prompts = [row.tolist() for row in ROWS]
                assert answers == whole.generate(prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=3)
        # Some processes have an expert more than others.
        assert (sum(parts), max(parts)) == (pytest.approx(1), pytest.approx(1 / size, rel=0.2))


def test_a_process_without_experts_is_refused(folders: list[Path]) -> None:
    """transformers cannot load a part that has none of them; seven are enough for seven processes, not for six."""
    facts = VerifierFacts.read(folders[1] / "config.json")
    sharded.loaded_in_parts(facts, 7)
    with pytest.raises(VerifierError, match=r"its 7 experts leave none for the last of 6 processes"):
        sharded.loaded_in_parts(facts, 6)


def test_an_older_transformers_is_refused(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 5.23, a caller could not choose the parts of a model that are sharded."""
    monkeypatch.setattr(sharded.dataclasses, "fields", lambda _: ())
    with pytest.raises(VerifierError, match=r"needs transformers 5\.23 or newer, found"):
        sharded.loaded_in_parts(VerifierFacts.read(folders[0] / "config.json"), 2)
