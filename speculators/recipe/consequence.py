"""What a change of one value means, in one line."""

from __future__ import annotations

from typing import Any

from speculators.config import VerifierFacts


def consequence(path: str, before: Any, after: Any, facts: VerifierFacts | None) -> str:
    """Returns one line about what a change means; "" where nothing certain can be said."""
    told = _COUNTED.get(path)
    if told is not None and _counts(before) and _counts(after):
        return told(float(before), float(after), facts)
    for prefix, words in _WORDS.items():
        if path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")):
            return words
    return ""


def _counts(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _vocabulary(before: float, after: float, facts: VerifierFacts | None) -> str:
    if facts is None:
        return f"{after - before:+,.0f} rows of the head"
    return f"{(after - before) * facts.hidden_size:+,.0f} parameters of the head"


_COUNTED = {
    "algorithm.draft_vocab_size": _vocabulary,
    "schedule.epochs": lambda a, b, _: f"{b / a:.3g} times the training",
    "schedule.max_steps": lambda a, b, _: f"{b / a:.3g} times the updates",
    "schedule.tokens_per_step": lambda a, b, _: (
        f"{b / a:.3g} times the tokens an update, {a / b:.3g} times the updates"
    ),
    "data.max_tokens": lambda _, b, __: f"conversations are cut at {b:,.0f} tokens",
}
# From the most particular path to the least.
_WORDS = {
    "verifier": "another verifier: nothing is reused, and results do not compare",
    "data.hidden_states": "where the states come from; they are the same, by a server but for rounding",
    "data.server": "where the server is, and how hard it is worked; the same states",
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
    "benchmark.suites": "measured on other prompts; the first suite also chooses the best checkpoint",
    "benchmark": "measured anew; a change of the largest K or the first T also chooses the checkpoint anew",
}
