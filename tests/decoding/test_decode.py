"""Decoding with drafts equals decoding without: token for token at T = 0, in distribution at T > 0."""

from __future__ import annotations

import itertools

import pytest
import torch
from chances import Chances, every_outcome, total_variation
from models.test_mtp import NATIVE
from toys import ToyDrafter, ToySpeculator, greedy_response, hidden_states_of, train_toy
from transformers import AutoModelForCausalLM

from speculators.decoding import target as target_module
from speculators.decoding import verify as verify_module
from speculators.decoding.hybrid import HybridDrafter
from speculators.decoding.loop import Round, decode
from speculators.decoding.ngram import NgramDrafter
from speculators.decoding.suffix import SuffixDrafter
from speculators.decoding.target import CachedVerifier
from speculators.drafter import Proposal, chain
from speculators.errors import VerifierError
from speculators.recipe.token_filter import TokenFilter
from speculators.verifier.tiny import make_tiny_verifier
from speculators.verifier.token_filter import filtered

LENGTH = 40
# Total variation by rounding of a forward with a cache and one without, in float32.
ROUNDING = 1e-5
PROMPTS = [[1, 20, 45, 77, 31], [1, 9, 250], [1, *range(100, 130)], [1, 63, 62, 61, 60, 59, 58]]


@pytest.fixture(scope="module")
def model(tiny_verifier):
    """The tiny verifier in float32, loaded by transformers."""
    return AutoModelForCausalLM.from_pretrained(tiny_verifier, dtype=torch.float32).eval()


@pytest.fixture(params=["joined layers", "transformers"])
def forward(request, monkeypatch):
    """Decodes through the few-row form of the verifier, and through transformers' own forward."""
    if request.param == "transformers":
        monkeypatch.setattr(target_module, "few_rows_verifier", lambda model: None)


@pytest.fixture(scope="module")
def responses(model):
    """Greedy continuations by full forwards without a cache."""
    return [greedy_response(model, prompt, length=LENGTH) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def trained(model, responses):
    """A toy fitted to just these continuations, with a reduced draft vocabulary."""
    known = torch.tensor(sorted({token for response in responses for token in response}))
    toy = ToySpeculator(state_size=96, vocab_size=320, draft_to_target=known)
    train_toy(toy, model, [prompt + response for prompt, response in zip(PROMPTS, responses, strict=True)], steps=150)
    return toy


def _adversary(trained: ToySpeculator) -> ToySpeculator:
    """Drafts the tokens that the trained drafter finds least likely."""
    toy = ToySpeculator(state_size=96, vocab_size=320, draft_to_target=trained.draft_to_target)
    toy.load_state_dict(trained.state_dict())
    toy.sign = -1.0
    return toy


def _run(model, drafter, prompt, **options):
    layer_ids = () if drafter is None else drafter.target_layer_ids
    options = {"max_new_tokens": LENGTH, "num_tokens": 4, **options}
    return decode(CachedVerifier(model, layer_ids), drafter, torch.tensor(prompt), **options)


@pytest.mark.parametrize("kind", ["plain", "trained", "random", "adversarial", "tree", "ngram", "suffix", "hybrid"])
def test_greedy_output_is_the_verifiers_own_token_for_token(kind, model, trained, responses, forward):
    """With any drafter, good or bad, the float32 output is that of full forwards without cache or drafts."""
    drafter = {
        "plain": lambda: None,
        "trained": trained.draft,
        "random": ToySpeculator(state_size=96, vocab_size=320, seed=9).draft,
        "adversarial": _adversary(trained).draft,
        "tree": lambda: ToyDrafter(trained, branches=3),
        "ngram": NgramDrafter,
        "suffix": SuffixDrafter,
        "hybrid": lambda: HybridDrafter(NgramDrafter(), trained.draft()),
    }[kind]()
    for prompt, response in zip(PROMPTS, responses, strict=True):
        assert list(_run(model, drafter, prompt).tokens) == response


def test_a_good_drafter_saves_rounds_and_a_bad_one_does_not(model, trained, responses):
    """A good drafter needs fewer rounds than a bad one: the test above does not pass for lack of accepted drafts."""
    good = [_run(model, trained.draft(), prompt) for prompt in PROMPTS]
    bad = [_run(model, _adversary(trained).draft(), prompt) for prompt in PROMPTS]
    assert sum(len(each.rounds) for each in good) < len(PROMPTS) * (LENGTH - 1) / 2
    assert [len(each.rounds) for each in bad] == [LENGTH - 1] * len(PROMPTS)


def test_a_tree_accepts_at_least_what_its_main_path_does(model, trained):
    """Siblings only add chances: no prompt needs more rounds with them, and all prompts together need fewer."""
    alone = [len(_run(model, ToyDrafter(trained, branches=1), prompt).rounds) for prompt in PROMPTS]
    tree = [len(_run(model, ToyDrafter(trained, branches=4), prompt).rounds) for prompt in PROMPTS]
    assert sum(tree) <= sum(alone)


class _Oracle:
    """Drafts a given continuation, with a decoy before each right token: the accepted path is never a prefix."""

    target_layer_ids = (0, 2, 4)

    def __init__(self, response: list[int]) -> None:
        self.response = response
        self.seen: list[torch.Tensor] = []

    def begin(self, tokens, hidden_states):
        self.seen.append(hidden_states)
        return {"place": 1}

    def propose(self, state, *, num_tokens, temperature, generator):
        tokens, parents, parent = [], [], -1
        for token in self.response[state["place"] : state["place"] + num_tokens]:
            tokens += [(token + 1) % 320, token]
            parents += [parent, parent]
            parent = len(tokens) - 1
        return Proposal(torch.tensor(tokens), torch.tensor(parents))

    def advance(self, state, tokens, hidden_states):
        self.seen.append(hidden_states)
        state["place"] += len(tokens)


def test_the_cache_keeps_the_accepted_path_of_a_tree_and_hands_on_its_states(model, responses, forward):
    """With a decoy before every right draft all of a round is still accepted, and the drafter receives, in order, the
    states of exactly the emitted tokens; 1e-5 of their size allows for float32 sums in another order."""
    prompt, response = PROMPTS[0], responses[0]
    oracle = _Oracle(response)
    decoded = _run(model, oracle, prompt, num_tokens=3)
    assert list(decoded.tokens) == response
    assert all(each.accepted == 3 for each in decoded.rounds[:-1])
    seen = torch.cat(oracle.seen)
    wanted, _ = hidden_states_of(model, prompt + response, oracle.target_layer_ids)
    known = min(len(seen), len(wanted))
    torch.testing.assert_close(seen[:known], wanted[:known], rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_hidden_state_ids_are_those_of_the_residual_stream(model, forward):
    """Id l enters layer l; id N is the last layer's output before the final norm."""
    verifier = CachedVerifier(model, (0, 1, 4))
    _, states = verifier.prefill(torch.tensor(PROMPTS[0]))
    wanted, last = hidden_states_of(model, PROMPTS[0], (0, 1))
    torch.testing.assert_close(states, torch.cat([wanted, last], dim=-1))


@pytest.mark.parametrize("forward", ["transformers"], indirect=True)
def test_hooks_are_there_only_during_a_forward_that_records(model, forward):
    """A drafter without states costs no hooks, and one with states leaves none behind."""

    def hooks(*_) -> int:
        return sum(len(layer._forward_pre_hooks) + len(layer._forward_hooks) for layer in model.model.layers)

    before, during = hooks(), []
    probe = model.model.norm.register_forward_pre_hook(lambda *_: during.append(hooks() - before))
    for layer_ids in ((), (1, 4)):
        _, states = CachedVerifier(model, layer_ids).prefill(torch.tensor(PROMPTS[0]))
        assert states.shape == (len(PROMPTS[0]), 32 * len(layer_ids))
    probe.remove()
    assert during == [0, 2]
    assert hooks() == before


def test_an_unknown_layer_is_an_error_that_says_what_there_is(model):
    """A layer id beyond the last is an error that names the range: 0 to 4 for four layers."""
    with pytest.raises(VerifierError, match="no layer id 5; its ids are 0 to 4"):
        CachedVerifier(model, (1, 5))


@pytest.mark.parametrize("model_type", ["gemma2", "mistral"])
def test_a_verifier_with_sliding_windows_scores_chains_and_trees(model_type, tmp_path):
    """In every second layer or in all of them a window of 4 tokens, counted along a node's path, hides earlier ones:
    the logits of a tree's path are those of full forwards (1e-5 of their size: float32), and so are the responses."""
    folder = make_tiny_verifier(tmp_path / "v", model_type=model_type, sliding_window=4)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    response = greedy_response(model, PROMPTS[0], length=16)
    assert list(_run(model, NgramDrafter(), PROMPTS[0], max_new_tokens=16).tokens) == response
    oracle = _Oracle(response)
    assert list(_run(model, oracle, PROMPTS[0], num_tokens=6, max_new_tokens=16).tokens) == response
    verifier = CachedVerifier(model)
    verifier.prefill(torch.tensor(PROMPTS[0]))
    proposal = oracle.propose({"place": 1}, num_tokens=6, temperature=0.0, generator=None)
    logits, _ = verifier.score(response[0], proposal)
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0] + response[:7]])).logits[0, len(PROMPTS[0]) :]
    # Row 0, then every second node: the right tokens, each behind its decoy.
    torch.testing.assert_close(logits[0::2], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module", params=["qwen3_5_text", "qwen3_next"])
def hybrid(request, tmp_path_factory):
    """A verifier with linear-attention layers in float32, dense or with experts, and its greedy responses."""
    folder = make_tiny_verifier(tmp_path_factory.mktemp("h") / "v", model_type=request.param, **NATIVE[request.param])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, [greedy_response(model, prompt, length=LENGTH) for prompt in PROMPTS]


class _PartlyRight(_Oracle):
    """Drafts a chain of a given continuation, wrong in places so that 4, 3, 2, 1 and 0 are accepted in turn."""

    def propose(self, state, *, num_tokens, temperature, generator):
        places = range(state["place"], min(state["place"] + num_tokens, len(self.response)))
        return chain(torch.tensor([(self.response[at] + (at % 15 in (0, 5, 9, 12, 14))) % 320 for at in places]))


@pytest.mark.parametrize("kind", ["plain", "random", "adversarial", "partly right"])
def test_a_hybrid_verifiers_greedy_output_is_its_own_token_for_token(kind, hybrid):
    """A running state cannot be cropped: it is restored after a rejection, and the accepted tokens are run again."""
    model, responses = hybrid
    toy = ToySpeculator(state_size=96, vocab_size=320, seed=9)
    if kind == "adversarial":
        train_toy(
            toy, model, [prompt + response for prompt, response in zip(PROMPTS, responses, strict=True)], steps=60
        )
        toy.sign = -1.0
    rounds = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        drafter = _PartlyRight(response) if kind == "partly right" else None if kind == "plain" else toy.draft()
        decoded = _run(model, drafter, prompt)
        assert list(decoded.tokens) == response
        rounds += decoded.rounds[:-1]
    accepted = {each.accepted for each in rounds}
    if kind == "adversarial":
        assert accepted == {0}
    if kind == "partly right":
        assert accepted == {0, 1, 2, 3, 4}


def _forwards(model, drafter) -> tuple[int, list[Round]]:
    """Counts the verifier's forwards for a response, and its rounds."""
    verifier = CachedVerifier(model, () if drafter is None else drafter.target_layer_ids)
    calls, forward = [], verifier._forward
    verifier._forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    rounds = decode(verifier, drafter, torch.tensor(PROMPTS[0]), max_new_tokens=LENGTH, num_tokens=4).rounds
    return len(calls), list(rounds)


@pytest.mark.parametrize("kind", ["trained", "random", "plain"])
def test_a_round_is_one_forward_unless_a_hybrid_verifier_refuses(kind, model, trained, hybrid):
    """With attention layers only, and in plain decoding, no token is run twice."""
    drafter = {
        "trained": trained.draft,
        "random": ToySpeculator(state_size=96, vocab_size=320, seed=9).draft,
        "plain": lambda: None,
    }[kind]()
    calls, rounds = _forwards(model, drafter)
    assert calls == 1 + len(rounds)
    calls, rounds = _forwards(hybrid[0], drafter)
    # The last round's drafts may be accepted and yet cut off.
    again = [each.accepted < each.drafted for each in rounds]
    assert calls - 1 - len(rounds) in (sum(again), sum(again[:-1]))


def test_a_tree_on_a_hybrid_verifier_is_refused(hybrid):
    """A tree is refused: a running state goes through the tokens one by one and has no branches."""
    verifier = CachedVerifier(hybrid[0])
    verifier.prefill(torch.tensor(PROMPTS[0]))
    with pytest.raises(VerifierError, match="linear-attention layers"):
        verifier.score(3, Proposal(torch.tensor([4, 5]), torch.tensor([-1, -1])))


def test_a_verifier_that_forgets_its_states_is_refused(tmp_path):
    """transformers' Jamba is refused: it ignores its states when it runs several tokens, and would score wrongly."""
    options = {"mamba_dt_rank": 8, "use_mamba_kernels": False, "attn_layer_offset": 1, "attn_layer_period": 2}
    folder = make_tiny_verifier(tmp_path / "v", model_type="jamba", num_experts=1, num_experts_per_tok=1, **options)
    with pytest.raises(VerifierError, match="JambaForCausalLM: transformers ignores the running states when it runs"):
        CachedVerifier(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def test_a_stop_token_inside_the_accepted_drafts_ends_the_response(model, responses):
    """Drafts past a stop token do not count as accepted, and nothing is emitted after it."""
    prompt, response = PROMPTS[0], responses[0]
    stop = response[7]
    end = response.index(stop)
    assert end > 0, "the stop token must not be the prefill's"

    class Chain(_Oracle):
        def propose(self, state, **options):
            return chain(torch.tensor(self.response[state["place"] :][:5]))

    decoded = _run(model, Chain(response), prompt, num_tokens=5, stop_ids={stop})
    assert list(decoded.tokens) == response[: end + 1]
    assert sum(each.emitted for each in decoded.rounds) == end
    assert decoded.rounds[-1].accepted == end - decoded.rounds[-1].anchor
    assert list(_run(model, None, prompt, stop_ids={stop}).tokens) == response[: end + 1]


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8])
def test_the_response_has_no_more_than_max_new_tokens(length, model, trained, responses):
    """Rounds always draft K and the surplus is cut off; a response of one token needs no round at all."""
    decoded = _run(model, trained.draft(), PROMPTS[1], max_new_tokens=length)
    assert list(decoded.tokens) == responses[1][:length]
    assert sum(each.emitted for each in decoded.rounds) == length - 1
    assert all(each.drafted == 4 for each in decoded.rounds)
    assert [each.anchor for each in decoded.rounds] == [
        sum(each.emitted for each in decoded.rounds[:index]) for index in range(len(decoded.rounds))
    ]


def _few_tokens(folder, **options):
    folder = make_tiny_verifier(folder / "few", seed=3, pad_token_id=None, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A verifier with two tokens, all of whose responses can be followed."""
    return _few_tokens(tmp_path_factory.mktemp("v"), vocab_size=2, num_hidden_layers=2)


def _deviation(model, *, branches: int = 1, hybrid: bool = False, block: bool = False, length: int = 4) -> float:
    """Computes the total variation between the responses of a decode and the verifier's own, over all outcomes.

    The verifier samples from two tokens at each place, and two are drafted from, so that there are few outcomes."""
    prompt, temperature, kept, size = [1, 0, 1], 0.8, TokenFilter(top_k=2), model.config.vocab_size
    every = torch.tensor([[*prompt, *tail] for tail in itertools.product(range(size), repeat=length)])
    with torch.no_grad():
        log_p = torch.log_softmax(filtered(model(every).logits / temperature, kept), dim=-1)[:, len(prompt) - 1 : -1]
    exact = log_p.gather(-1, every[:, len(prompt) :, None]).sum(dim=(1, 2)).double().exp()
    options = {"draft_to_target": torch.arange(2), "target_layer_ids": (0, 2)}
    toy = ToySpeculator(state_size=64, vocab_size=size, seed=1, **options)
    toy.sign = 3.0
    verifier, drafter = CachedVerifier(model, toy.target_layer_ids), ToyDrafter(toy, branches)
    if hybrid:
        drafter = HybridDrafter(NgramDrafter(), drafter)
    options = {"max_new_tokens": length, "num_tokens": 2, "temperature": temperature, "token_filter": kept}
    options["block_verification"] = block

    def respond(chances: Chances) -> tuple[int, ...]:
        return decode(verifier, drafter, torch.tensor(prompt), generator=chances, **options).tokens

    found = dict.fromkeys(map(tuple, every[:, len(prompt) :].tolist()), 0.0)
    for tokens, weight in every_outcome(respond):
        found[tokens] += weight
    return total_variation(torch.tensor([*found.values()], dtype=torch.float64), exact)


SHAPES = {"chain": {}, "block": {"block": True}, "tree": {"branches": 2}, "hybrid": {"hybrid": True}}


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_responses_have_the_verifiers_exact_distribution(shape, two):
    """Chains by either rule, trees, and a look-up beside a speculator leave the distribution exact, with caches."""
    assert _deviation(two, **SHAPES[shape]) < ROUNDING


def test_sampled_responses_of_a_verifier_with_running_states_have_its_exact_distribution(tmp_path):
    """After an accepted draft, a rejected one and none, the states are those of the sampled tokens."""
    model = _few_tokens(tmp_path, vocab_size=4, model_type="qwen3_5_text", **NATIVE["qwen3_5_text"])
    assert _deviation(model, length=3) < ROUNDING


@pytest.mark.parametrize("shape", SHAPES)
def test_a_wrong_rule_fails_the_live_distribution_test(shape, two, monkeypatch):
    """The test above finds the fault if the residual is left out."""
    monkeypatch.setattr(verify_module, "residual", lambda p, q, token: p)
    assert _deviation(two, **SHAPES[shape], length=3) > 100 * ROUNDING


def test_a_cache_that_keeps_rejected_drafts_fails_the_live_distribution_test(two, monkeypatch):
    """The test above finds states that are not those of the sampled tokens."""
    keep = CachedVerifier.keep
    monkeypatch.setattr(CachedVerifier, "keep", lambda self, path: keep(self, range(len(self._scored) - 1)))
    assert _deviation(two, length=3) > 100 * ROUNDING
