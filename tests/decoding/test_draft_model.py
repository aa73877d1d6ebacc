"""A smaller model as a drafter: its replay is exact, its output lossless, and another tokenizer is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from models.test_mtp import HYBRID
from toys import greedy_response
from transformers import AutoModelForCausalLM

from speculators.bench.replay import replay
from speculators.bench.rows import JudgedResponse, Response, judge
from speculators.bench.walk import greedy_rounds
from speculators.decoding.baselines import LOOK_UP_DRAFTERS, make_baseline
from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier
from speculators.errors import SpeculatorsError, VerifierError
from speculators.structure.validators import LOOK_UPS
from speculators.verifier.engine import Engine
from speculators.verifier.tiny import make_tiny_verifier
from speculators.verifier.weights import load_head

PROMPTS = [[1, 20, 45, 77, 31], [1, 9, 250], [1, *range(100, 130)]]
K = 4


@pytest.fixture(scope="module")
def verifier(tiny_verifier):
    """The tiny verifier in float32."""
    return Engine(tiny_verifier, dtype="float32")


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """Another random model with the same tokenizer, and the verifier's embeddings so that some drafts are right."""
    return make_tiny_verifier(tmp_path_factory.mktemp("draft") / "small", num_hidden_layers=2)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A random model with linear-attention layers and the same tokenizer."""
    return make_tiny_verifier(tmp_path_factory.mktemp("draft") / "hybrid", model_type="qwen3_5_text", **HYBRID)


@pytest.fixture(scope="module", params=["smaller", "itself", "hybrid"])
def baseline(request, verifier, smaller, hybrid, tiny_verifier):
    """A model that is often wrong, the verifier itself, which never is, and a model whose states cannot be cropped."""
    source = {"smaller": smaller, "itself": tiny_verifier, "hybrid": hybrid}[request.param]
    return make_baseline(f"draft_model:{source}", verifier)


def rows_of(verifier, temperature=0.0) -> list[JudgedResponse]:
    head = load_head(verifier.folder, verifier.facts)
    rows = []
    for index, prompt in enumerate(PROMPTS):
        tokens = (*prompt, *greedy_response(verifier.model, prompt, length=24))
        response = Response(id=str(index), category="", tokens=tokens, prompt_length=len(prompt))
        states, last = verifier.capture([torch.tensor(tokens)], (1,))[0]
        rows.append(judge(head, response, states, last, temperature=temperature))
    return rows


def test_replay_equals_live_round_for_round(baseline, verifier):
    """Each live round accepts what replay says, and the output is the verifier's own, token for token."""
    rows = rows_of(verifier)
    tables = replay(baseline.replays, rows, k_max=K, temperature=0.0).acceptance
    for row, table in zip(rows, tables, strict=True):
        decoded = decode(
            CachedVerifier(verifier.model, ()),
            baseline.draft(),
            torch.tensor(row.response.prompt),
            max_new_tokens=len(row.response.answer),
            num_tokens=K,
            temperature=0.0,
            generator=None,
        )
        assert tuple(decoded.tokens) == row.response.answer
        assert [(each.anchor, each.accepted) for each in decoded.rounds] == greedy_rounds(table, K)


def test_the_verifier_accepts_all_of_its_own(verifier, tiny_verifier):
    """Drafts of the verifier itself are always accepted: at any temperature p / q is 1."""
    model = make_baseline(f"draft_model:{tiny_verifier}", verifier).replays
    for temperature in (0.0, 0.7):
        counts = replay(model, rows_of(verifier, temperature), k_max=K, temperature=temperature).counts(K)
        assert counts.accepted.sum() / counts.reached.sum() > 0.999


def test_sampled_drafts_come_with_their_distribution(verifier, smaller):
    """Draft probabilities cover the verifier's vocabulary, as the rejection rule needs."""
    drafter = make_baseline(f"draft_model:{smaller}", verifier).draft()
    tokens = torch.tensor(PROMPTS[2])
    state = drafter.begin(tokens, torch.empty(0, 0))
    generator = torch.Generator().manual_seed(0)
    proposal = drafter.propose(state, num_tokens=K, temperature=1.0, generator=generator)
    model = AutoModelForCausalLM.from_pretrained(smaller, dtype=torch.float32)
    whole = torch.cat((tokens, proposal.tokens))
    with torch.no_grad():
        wanted = torch.softmax(model(whole[None]).logits[0, len(tokens) - 1 : -1], -1)
    assert proposal.probs is not None
    # float32 with and without a cache.
    assert torch.allclose(proposal.probs, wanted, atol=1e-5)


def test_another_tokenizer_is_refused(verifier, smaller, tmp_path):
    """The error names the first id that differs, with both tokens."""
    folder = tmp_path / "other"
    shutil.copytree(smaller, folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = [token for token, index in sorted(vocab.items(), key=lambda item: item[1])][-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(VerifierError, match=r"differs from the verifier's: .*; id .* is .*, the verifier's is"):
        make_baseline(f"draft_model:{folder}", verifier)


def test_a_missing_draft_model_is_one_error(verifier, tmp_path):
    """A missing draft model is one error that names the folder."""
    with pytest.raises(SpeculatorsError, match="nowhere"):
        make_baseline(f"draft_model:{tmp_path}/nowhere", verifier)


def test_the_baselines_known_without_torch_are_those_that_there_are():
    """The baselines that a recipe allows are those that can be made."""
    assert tuple(LOOK_UP_DRAFTERS) == LOOK_UPS
