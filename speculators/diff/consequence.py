"""Explains in one line what a change of one value means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from speculators.facts import VerifierFacts

VOCABULARY = "algorithm.draft_vocab_size"


def consequence(
    path: str, before: Any, after: Any, facts: VerifierFacts | None, parameters: Mapping[int, int] | None = None
) -> str:
    """Explains a change in one line; "" where nothing certain can be said.

    Args:
        facts: the verifier's config.json, where it is known.
        parameters: parameters of the speculator by size of its draft vocabulary, where they were counted.
    """
    if path == VOCABULARY:
        return _vocabulary(before, after, facts, parameters or {})
    ratio = _RATIOS.get(path)
    if ratio is not None and _is_positive(before) and _is_positive(after):
        return ratio(float(before), float(after))
    for prefix, text in _BY_PREFIX.items():
        if path == prefix or path.startswith((f"{prefix}.", f"{prefix}[")):
            return text
    return ""


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _vocabulary(before: Any, after: Any, facts: VerifierFacts | None, parameters: Mapping[int, int]) -> str:
    if facts is not None:  # "none" means the verifier's whole vocabulary
        before, after = (facts.vocab_size if size is None else size for size in (before, after))
    if not (_is_positive(before) and _is_positive(after)):
        return ""
    if before in parameters and after in parameters:
        return f"{parameters[after] - parameters[before]:+,} parameters"
    # Only the model knows how many heads it has, and what else has a row per token.
    rows = after - before
    return f"{rows:+,} rows of one head" if facts is None else f"{rows * facts.hidden_size:+,} parameters of one head"


_RATIOS: dict[str, Callable[[float, float], str]] = {
    "schedule.epochs": lambda a, b: f"{b / a:.3g} times the training",
    "schedule.max_steps": lambda a, b: f"{b / a:.3g} times the updates",
    "schedule.tokens_per_step": lambda a, b: f"{b / a:.3g} times the tokens per update, {a / b:.3g} times the updates",
    "data.max_tokens": lambda _, b: f"conversations are cut at {b:,.0f} tokens",
}
# From the most particular path to the least: the first that fits is used.
_BY_PREFIX = {
    "verifier.dtype": "a different precision of the verifier: all it computes is redone; results are not comparable",
    "verifier": "a different verifier: nothing is reused, and results are not comparable",
    "data.hidden_states": "where the states come from; they are the same, except for rounding by a server",
    "data.server": "where the servers are and how many requests they get at once; the states are the same",
    "data.store": "only where stored states are read from",
    "data.states_dtype": "the same conversations; their states are stored at another precision; training runs again",
    "data": "different training data",
    "algorithm.target_layer_ids": "different hidden states: they are captured again",
    "algorithm.name": "a different algorithm, with its own keys",
    "algorithm": "the speculator is trained again",
    "schedule.checkpoint_every": "how often checkpoints are written; the weights are the same",
    "schedule.keep_checkpoints": "how many checkpoints are kept; the weights are the same",
    "schedule": "the speculator is trained again",
    "seed": "different initial weights and a different order of the data",
    "distributed": "how processes share the work; the recipe is the same",
    "benchmark.live_prompts": "how much of tau the live decode confirms; tau is the same",
    "benchmark.live_tokens": "how much of tau the live decode confirms; tau is the same",
    "benchmark.timed_dtype": "the precision in which decoding is timed; tau is the same",
    "benchmark.baselines": "which baselines are measured as well; tau is the same",
    "benchmark.trees": "which trees are measured as well; tau of chains is the same",
    **dict.fromkeys(
        ("benchmark.top_p", "benchmark.top_k", "benchmark.min_p"),
        "the verifier samples from other tokens, so tau above T = 0 is not comparable",
    ),
    "benchmark.verification": "drafts are verified by another rule, so tau above T = 0 is not comparable",
    "benchmark.suites": "different prompts, which are also kept out of the training data: the data is prepared again",
    "benchmark": "acceptance is measured again; another largest K or first T also changes which checkpoint is chosen",
}
