"""Every family of verifiers: its config, its states, its head, its decoding and its generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from verifier.families import VALUES, make, write_whole

from speculators.decoding.cache import is_recurrent, new_cache, windows
from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier, tree_fault
from speculators.drafter import Proposal, chain
from speculators.errors import VerifierError
from speculators.facts import _FROM_CLASS, VerifierFacts
from speculators.recipe.families import FAMILIES, INDEXED, KEYS, SHARED, STATES, WINDOWS, VerifierFamily, families_table
from speculators.verifier.engine import Engine
from speculators.verifier.generate import Sampling, generate_batches
from speculators.verifier.weights import load_embeddings, load_head

PROMPTS = [[3, 20, 45, 77, 31, 9, 11, 40], [5, 9], [7, *range(30, 42)]]
NEW = 10
STOP = 2


def greedy(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def until_stop(response: list[int]) -> list[int]:
    return response[: response.index(STOP) + 1] if STOP in response else response


class PartlyRight:
    """Drafts three tokens of a known continuation, wrong at every third place: all, some and none are accepted."""

    target_layer_ids = (1, 4)

    def __init__(self, response: list[int]) -> None:
        self.response = response
        self.states: list[torch.Tensor] = []

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> dict[str, int]:
        self.states.append(hidden_states)
        return {"place": 1}

    def propose(self, state: dict[str, int], **_: Any) -> Any:
        places = range(state["place"], min(state["place"] + 3, len(self.response)))
        return chain(torch.tensor([(self.response[at] + (at % 4 == 2)) % 96 for at in places], dtype=torch.int64))

    def advance(self, state: dict[str, int], tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        self.states.append(hidden_states)
        state["place"] += len(tokens)


@attrs.frozen(eq=False)
class Trial:
    family: VerifierFamily
    folder: Path
    engine: Engine
    responses: list[list[int]]


# Rarer ones, or those whose layers are like another's.
SLOW = (
    *(
        "Qwen3",
        "Qwen3.5 MoE",
        "Qwen3-VL",
        "Mistral, Ministral (2024)",
        "Ministral 3",
        "DeepSeek-V2",
        "GLM-4",
        "GLM-4.5",
    ),
    *(
        "MiniMax-M2",
        "OLMo 2",
        "OLMoE",
        "Hunyuan",
        "Ernie 4.5",
        "Seed-OSS",
        "SmolLM3",
        "EXAONE 4",
        "OLMo 3",
        "Kimi Linear",
    ),
    *("Command R", "Falcon-H1", "Mixtral"),
)
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in VALUES]


@pytest.fixture(scope="module", params=EACH)
def trial(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = make(tmp_path_factory.mktemp("family") / "v", request.param)
    engine = Engine(folder)
    family = next(each for each in FAMILIES if each.name == request.param)
    return Trial(family, folder, engine, [greedy(engine.model, prompt) for prompt in PROMPTS])


def test_the_tables_name_the_same_families() -> None:
    """What the README lists and light commands take as known is what these tests run."""
    assert {*VALUES} == {family.name for family in FAMILIES}
    assert len(FAMILIES) == len(VALUES)
    assert families_table() in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_says_what_a_family_keeps(trial: Trial) -> None:
    """Its layers' caches are of the kind that the table puts it under."""
    cache = new_cache(trial.engine.model).layers
    names = {type(layer).__name__ for layer in cache}
    kinds = {
        STATES: is_recurrent(trial.engine.model),
        INDEXED: "DynamicIndexedLayer" in names,
        SHARED: trial.family.model_type == "gemma4_text" and "DummyLayer" in names,
        WINDOWS: "sliding_attention" in windows(trial.engine.model),
    }
    assert next((keeps for keeps, holds in kinds.items() if holds), KEYS) == trial.family.keeps


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results differ by no more than float32 sums in another order do."""
    return bool((a - b).abs().max() <= 2e-5 * b.abs().max())


def test_a_drafted_tree_is_scored_as_its_path_is_alone(trial: Trial) -> None:
    """Where a decoy stands before each token of a continuation, longer than any window, its logits are those of a
    forward without drafts, and after keeping the path so are the next token's; else the tree is refused."""
    prompt, path = torch.tensor(PROMPTS[0]), [12, 33, 50, 61, 44, 25, 17, 80]
    tokens = [token for right in path for token in (right + 1, right)]
    parents = [parent for parent in (-1, 1, 3, 5, 7, 9, 11, 13) for _ in range(2)]
    verifier = CachedVerifier(trial.engine.model)
    verifier.prefill(prompt)
    proposal = Proposal(torch.tensor(tokens), torch.tensor(parents))
    if fault := tree_fault(trial.engine.model):
        with pytest.raises(VerifierError, match=fault):
            verifier.score(9, proposal)
        return
    logits, _ = verifier.score(9, proposal)
    verifier.keep(range(1, len(tokens), 2))
    after, _ = verifier.score(5)
    with torch.no_grad():
        every = torch.tensor([[*prompt, 9, *path, 5]])
        alone = trial.engine.model(input_ids=every, use_cache=False).logits[0, len(prompt) :]
    assert close(torch.cat([logits[0::2], after]), alone)


def test_a_config_saved_as_a_difference_has_the_facts_of_a_whole_one(trial: Trial) -> None:
    """Values that a file omits as its class's defaults are those that the whole file states."""
    published, whole = trial.engine.facts, VerifierFacts.read(write_whole(trial.folder))
    assert {key: published.get(key) for key in _FROM_CLASS} == {key: whole.get(key) for key in _FROM_CLASS}


def test_captured_states_are_transformers_own(trial: Trial) -> None:
    """Alone and beside longer rows, id l is hidden_states[l], and the last one is what the final norm reads."""
    rows = [torch.tensor(prompt) for prompt in PROMPTS]
    captured = trial.engine.capture(rows, (0, 2, 3))
    for row, (states, last) in zip(rows, captured, strict=True):
        with torch.no_grad():
            theirs = trial.engine.model(input_ids=row[None], output_hidden_states=True, use_cache=False).hidden_states
        assert close(states, torch.cat([theirs[0][0], theirs[2][0], theirs[3][0]], -1))
        head = load_head(trial.folder, trial.engine.facts)
        assert close(head.normalize(last), theirs[4][0])


def test_documents_of_a_packed_row_have_the_states_that_they_have_alone(trial: Trial) -> None:
    """Side by side where the model keeps them apart; in padded batches where states run on, the mask does not know
    where documents begin (gpt-oss), or attention has chunks (Llama 4)."""
    engine, rows = trial.engine, [torch.tensor(prompt) for prompt in (*PROMPTS, [6], *PROMPTS)]
    apart = trial.family.keeps != STATES and trial.family.model_type not in ("gpt_oss", "llama4")
    assert engine.keeps_apart == apart
    captured = list(engine.capture_packed(rows, (0, 2, 3)))
    assert sorted(index for index, _, _ in captured) == list(range(len(rows)))
    for index, *states in captured:
        ((chosen, last),) = engine.capture([rows[index]], (0, 2, 3))
        assert close(states[0], chosen)
        assert close(states[1], last)


def test_head_and_embeddings_read_from_the_files_are_the_verifiers(trial: Trial) -> None:
    """Logits from the last state are the model's own, and the embeddings are those of its input."""
    head = load_head(trial.folder, trial.engine.facts)
    trial.engine.check_head(head)
    assert torch.equal(load_embeddings(trial.folder), trial.engine.model.get_input_embeddings().weight)


def test_live_decoding_is_greedy_decoding_also_after_rejections(trial: Trial) -> None:
    """With drafts that are partly rejected, the tokens are those of full forwards, and so are the states handed on."""
    for prompt, response in zip(PROMPTS, trial.responses, strict=True):
        drafter = PartlyRight(response)
        verifier = CachedVerifier(trial.engine.model, drafter.target_layer_ids)
        decoded = decode(verifier, drafter, torch.tensor(prompt), max_new_tokens=NEW, num_tokens=3)
        assert list(decoded.tokens) == response
        assert {0, 3} > {each.accepted for each in decoded.rounds} - {1, 2}, decoded.rounds
        ((states, last),) = trial.engine.capture([torch.tensor([*prompt, *response])], (1,))
        seen = torch.cat(drafter.states)
        count = min(len(seen), len(last))
        assert close(seen[:count], torch.cat([states, last], -1)[:count])


def test_generated_answers_are_greedy_decoding(trial: Trial) -> None:
    """Prompts of unequal lengths in one batch, with the cache, give the tokens of full forwards."""
    answers: list[list[int]] = [[] for _ in PROMPTS]
    for indices, outputs in generate_batches(trial.engine.model, PROMPTS, Sampling(max_new_tokens=NEW), [STOP]):
        for index, output in zip(indices, outputs, strict=True):
            answers[index] = output
    assert answers == [until_stop(response) for response in trial.responses]
