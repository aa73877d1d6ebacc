"""Processes that hold one verifier together compute what one process with a whole copy does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import SERVER
from sharing import LAYER_IDS, MAX_NEW_TOKENS, ROWS, compute, share_of

from speculators.errors import VerifierError
from speculators.events import ignore
from speculators.facts import VerifierFacts
from speculators.pipeline import Places
from speculators.pipeline.setup import make_context
from speculators.recipe.load import load_recipe
from speculators.training.world import World
from speculators.verifier import sharded
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier

# Seven experts cannot be divided evenly among processes.
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


needs_parts = pytest.mark.skipif(
    not sharded.can_load_parts(),
    reason="transformers before 5.23 cannot load parts of a model, which a test below checks",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A verifier whose head is its embedding, and one with experts and a head of its own."""
    home = tmp_path_factory.mktemp("verifiers")
    return [make_tiny_verifier(home / "tied"), make_tiny_verifier(home / "experts", tie=False, **EXPERTS)]


@needs_parts
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


@needs_parts
def test_a_process_without_experts_is_refused(folders: list[Path]) -> None:
    """transformers cannot load a part that has none of them; seven are enough for seven processes, not for six."""
    facts = VerifierFacts.read(folders[1] / "config.json")
    sharded.loaded_in_parts(facts, 7)
    with pytest.raises(VerifierError, match=r"its 7 experts leave none for the last of 6 processes"):
        sharded.loaded_in_parts(facts, 6)


@pytest.mark.parametrize(
    ("size", "sets", "message"),
    [
        (
            2,
            ("data.hidden_states='cached'",),
            r"needs transformers 5\.23 or newer, found .*\npip install 'transformers>=5",
        ),
        (1, ("data.hidden_states='cached'",), "nobody/nothing"),
        (2, ("data.hidden_states='server'", "data.server.evaluate=true"), "nobody/nothing"),
    ],
)
def test_an_older_transformers_is_refused(
    size: int, sets: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 5.23, a caller could not choose the parts of a model that are sharded. A run says so before it looks for
    the verifier; one process needs none of it, and neither does a launch whose servers do all the verifier's work."""
    monkeypatch.setattr(sharded, "can_load_parts", lambda: False)
    verifier = ("verifier.model='nobody/nothing'", f"verifier.revision='{'0' * 40}'", "verifier.sha256='none'")
    recipe = load_recipe("smoke", [*verifier, "distributed.shard_verifier=true", *sets])
    places = Places(runs=tmp_path / "runs", cache=tmp_path / "cache")
    with pytest.raises(VerifierError, match=message):
        make_context(recipe, places, World(size=size), ignore)
