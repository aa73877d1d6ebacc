"""What a change of one value means, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from speculators.facts import VerifierFacts

VOCABULARY = "algorithm.draft_vocab_size"


def consequence(
    path: str, before: Any, after: Any, facts: VerifierFacts | None, parameters: Mapping[int, int] | None = None
) -> str:
    """Returns one line about what a change means; "" where nothing certain can be said.

    Args:
        facts: the verifier's config.json, where it is known.
        parameters: of the speculator by draft vocabulary, where they were counted.
    """
    if path == VOCABULARY:
        return _vocabulary(before, after, facts, parameters or {})
    told = _COUNTED.get(path)
    if told is not None and _counts(before) and _counts(after):
        return told(float(before), float(after))
    for prefix, words in _WORDS.items():
        if path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")):
            return words
    return ""


def _counts(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _vocabulary(before: Any, after: Any, facts: VerifierFacts | None, parameters: Mapping[int, int]) -> str:
    if facts is not None:  # none is all of the verifier's
        before, after = (facts.vocab_size if size is None else size for size in (before, after))
    if not (_counts(before) and _counts(after)):
        return ""
    if before in parameters and after in parameters:
        return f"{parameters[after] - parameters[before]:+,} parameters"
    # How many heads there are, and what else has a row a token, only the model knows.
    rows = after - before
    return f"{rows:+,} rows of one head" if facts is None else f"{rows * facts.hidden_size:+,} parameters of one head"


_COUNTED = {
    "schedule.epochs": lambda a, b: f"{b / a:.3g} times the training",
    "schedule.max_steps": lambda a, b: f"{b / a:.3g} times the updates",
    "schedule.tokens_per_step": lambda a, b: f"{b / a:.3g} times the tokens an update, {a / b:.3g} times the updates",
    "data.max_tokens": lambda _, b: f"conversations are cut at {b:,.0f} tokens",
}
# From the most particular path to the least.
_WORDS = {
    "verifier.dtype": "the same verifier in another precision: what it computes is made anew; results do not compare",
    "verifier": "another verifier: nothing is reused, and results do not compare",
    "data.hidden_states": "where the states come from; they are the same, by a server but for rounding",
    "data.server": "where the server is, and how hard it is worked; the same states",
    "data.states_dtype": "the same conversations; their states are made in another precision, and trained on anew",
    "data": "other training data",
    "algorithm.target_layer_ids": "other hidden states: they are captured anew",
    "algorithm.name": "another algorithm: its other keys are its own",
    "algorithm": "trained anew",
    "schedule.checkpoint_every": "how often, not what: the same weights",
    "schedule.keep_checkpoints": "how many are kept, not what: the same weights",
    "schedule": "trained anew",
    "seed": "other initial weights and another order of the data",
    "distributed": "how the work is shared; the same recipe",
    "benchmark.live_prompts": "how much the live decode confirms; tau is the same",
    "benchmark.live_tokens": "how much the live decode confirms; tau is the same",
    "benchmark.baselines": "what is measured beside; tau is the same",
    "benchmark.suites": "measured on other prompts, which are also kept out of the training data: that is made anew",
    "benchmark": "measured anew; a change of the largest K or the first T also chooses the checkpoint anew",
}
