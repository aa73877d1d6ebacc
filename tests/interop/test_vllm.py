"""vLLM serves what we train, losslessly, and accepts draft for draft what our live decode accepts.

vLLM runs on this machine's CPU in float32 (in 16 bits forwards over one token and over many choose different tokens).
Its rounds are read twice: step by step from its engine, and from its own counters.
"""

from __future__ import annotations

import pytest
from foreign import vllm
from trained import draft_gap, live, logit_gap, questions

from speculators.model import SpeculatorModel

pytestmark = pytest.mark.interop

PROMPTS, TOKENS = 6, 64
# The verifier's cached decode and a whole forward differ by up to 8e-5 (tests/models/test_real_verifier.py).
NEAR_TIE = 1e-3
# vLLM's DFlash logits on a CPU differ from ours by up to 3.5e-3 of 8 (2026-11-25; it is not known why), ours from
# upstream's by at most 1e-4 (test_upstream.py). Each of a draft's best two tokens may be that far off; models differ:
# where the two are nearer than this, the draft may be the other one there (seen: 0.0017 and 0.0058).
DRAFT_NEAR_TIE = 1e-2
ARGUMENTS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 2, "seed": 0}


def _ask(model, prompts, work, *, logprobs):
    request = {"model": str(model), "arguments": ARGUMENTS, "prompts": prompts, "max_tokens": TOKENS}
    return vllm().call("run_vllm.py", {**request, "logprobs": logprobs}, work)["responses"]


@pytest.fixture(scope="module")
def plain(engine, tmp_path_factory):
    """What vLLM answers without a speculator, with the gap between its best two tokens at each place."""
    return _ask(engine.folder, questions(engine, PROMPTS), tmp_path_factory.mktemp("plain"), logprobs=True)


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_peagle", "quickstart_dflash"])
def test_vllm_accepts_what_our_live_decode_accepts(recipe, engine, run_of, plain, tmp_path):
    """The run's `speculator/` folder as it is: the same tokens as without it, and round for round the drafts that ours
    accepts, by vLLM's steps and by its counters, up to a near tie of a draft's own."""
    prompts = questions(engine, PROMPTS)
    folder = run_of(recipe) / "speculator"
    served = _ask(folder, prompts, tmp_path, logprobs=False)
    model = SpeculatorModel.from_pretrained(folder, verifier=engine.folder)
    (method,) = model.config.speculators_config.proposal_methods
    k = method.speculative_tokens
    ours = live(engine, model, prompts, k=k, max_tokens=TOKENS)
    accepted, compared = 0, 0
    for number, (prompt, own, other, without) in enumerate(zip(prompts, ours, served, plain, strict=True)):
        assert other["tokens"] == without["tokens"], _first(engine, prompt, without["tokens"], other["tokens"], without)
        assert list(own.tokens) == other["tokens"], _first(engine, prompt, own.tokens, other["tokens"], without)
        parting = next(
            (n for n, pair in enumerate(zip(own.steps, other["steps"], strict=False)) if len({*pair}) > 1), None
        )
        if parting is not None:
            depth = min(own.steps[parting], other["steps"][parting]) - 1
            gap = draft_gap(engine, model, prompt, own, number=parting, depth=depth, k=k)
            assert gap < DRAFT_NEAR_TIE, f"prompt {number}, round {parting}: our best two differ by {gap:.6f}"
            continue
        assert list(own.steps) == other["steps"], f"prompt {number}: tokens a round"
        compared += 1
        counters = other["counters"]
        assert counters["drafts"] == len(own.steps) - 1
        assert counters["draft_tokens"] == k * (len(own.steps) - 1)
        assert tuple(counters["by_position"]) == own.by_position
        accepted += counters["accepted"]
    assert compared >= PROMPTS - 2, "near ties of drafts: too few prompts were compared to their end"
    assert accepted > 0, "nothing was ever accepted: agreement would prove nothing"


def _first(engine, prompt, left, right, plain):
    """Where two responses part, and how close the two tokens are for both verifiers."""
    place = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    if place >= min(len(left), len(right)):
        return f"lengths differ: {len(left)} and {len(right)}"
    gap = logit_gap(engine, [*prompt, *left[:place]], left[place], right[place])
    words = f"token {place}: {left[place]} and {right[place]}; our verifier's logits differ by {gap:.6f}"
    words += f", vLLM's best two log-probabilities there by {plain['gaps'][place]:.6f}"
    return words + (" (a near tie)" if abs(gap) < NEAR_TIE else "")
