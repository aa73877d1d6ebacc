"""The ledger of a run: for each (suite, K, T) what was predicted, measured and served, and where they part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from speculators.bench.referee import TOO_FEW
from speculators.bench.statistics import bootstrap_difference, bootstrap_ratio

Values = Mapping[str, Any]

TRAINED, PREDICTED, MEASURED, SERVED = "predicted in training", "predicted", "measured live", "served"
# Paired intervals are narrow where two sides differ in a round or two: a gap below this share of tau is rounding.
ROUNDING = 0.01
LEVEL = 0.99

CAUSES = {
    TRAINED: "the exported weights are not those of the checkpoint that was evaluated, or are rounded (dtype)",
    MEASURED: "the step-by-step decode is not the computation that was trained: its cache, its positions, or the "
    "states that it is given; over the verifier's own responses: the temperature that they were made at",
    SERVED: "another speculator or verifier is served; the engine reads other layers (ids off by one), another RoPE "
    "(theta, scaling, partial factor), or a shorter max_position_embeddings than was trained; it ignores an option of "
    "config.json (norms); a vocabulary map or head of another run; 16-bit weights where float32 was measured",
}
MORE = "more is accepted than can be: another speculator is served, or its output is not the verifier's own"
FIRST_POSITION = "the first draft is accepted less already: layer ids, token or position shifts, vocabulary map, head"
# vLLM's draft_sample_method is "greedy" unless it is told otherwise; no server says which it has.
SAMPLED = (
    "above T=0 a server may draft its likeliest token, as vLLM does by default, where drafts are predicted to be "
    "sampled: another quantity, over other answers; a gap at T=0 is the one that tells of a fault"
)
LATER_POSITIONS = (
    "the first draft is accepted as predicted, later ones are not: the state that a depth hands on, or its position"
)


@attrs.frozen(kw_only=True)
class LedgerEntry:
    """One number of the ledger.

    Attributes:
        kind: one of the four above.
        source: what it comes from: a device and dtype, or an engine and its version.
        prompts: that it is over.
        interval: 95%, bootstrap over prompts; None where there is none.
        expected: what is predicted on the same prompts; None where nothing is.
        tolerance: where `tau` must lie (by round: None and no tolerance), None where it is not compared.
        gap: what is wrong, "" if nothing.
        note: why it is not compared, or what else a reader must know.
    """

    kind: str
    source: str
    tau: float
    prompts: int | None
    interval: tuple[float, float] | None
    definition: str
    expected: float | None = None
    tolerance: tuple[float, float] | None = None
    gap: str = ""
    note: str = ""


@attrs.frozen(kw_only=True)
class LedgerLine:
    """All that is known of one (suite, K, T)."""

    suite: str
    num_speculative_tokens: int
    temperature: float
    entries: tuple[LedgerEntry, ...]

    @property
    def alarms(self) -> tuple[str, ...]:
        """Returns every gap, in words."""
        place = f"{self.suite}, K={self.num_speculative_tokens}, T={self.temperature:g}"
        return tuple(f"{place}: {entry.kind} ({entry.source}): {entry.gap}" for entry in self.entries if entry.gap)


@attrs.frozen(kw_only=True)
class TrainedTau:
    """What training itself measured of the checkpoint that was exported.

    Attributes:
        step: updates after which.
    """

    suite: str
    num_speculative_tokens: int
    temperature: float
    tau: float
    step: int


def ledger(benches: Sequence[Values], served: Sequence[Values], trained: Sequence[TrainedTau]) -> list[LedgerLine]:
    """Returns the ledger of a run.

    Args:
        benches: in-process benchmarks as JSON values, oldest first: the newest of a setting counts.
        served: benchmarks of servers as JSON values, oldest first: the newest of a setting and engine counts.
        trained: training's own numbers; none where no suite was evaluated.
    """
    predicted = {_key(setting): (bench, setting) for bench in benches for setting in bench["settings"]}
    engines: dict[tuple[Any, ...], tuple[Values, Values]] = {}
    for result in served:
        for setting in result["settings"]:
            where = (*_key(setting), result["engine"], result["version"])
            engines[where] = (result, setting)
    own = {(one.suite, one.num_speculative_tokens, one.temperature): one for one in trained}
    keys = dict.fromkeys([*predicted, *(key[:3] for key in engines), *own])
    lines = []
    for key in keys:
        bench, setting = predicted.get(key, (None, None))
        entries = [_trained(own[key], setting)] if key in own else []
        if bench is not None and setting is not None:
            entries.append(_predicted(bench, setting))
            entries += [_live(bench, setting)] if setting["live"] else []
        entries += [_served(pair, bench, setting) for held, pair in engines.items() if held[:3] == key]
        lines.append(
            LedgerLine(suite=key[0], num_speculative_tokens=key[1], temperature=key[2], entries=tuple(entries)),
        )
    return lines


def _key(setting: Values) -> tuple[str, int, float]:
    return setting["suite"], setting["num_speculative_tokens"], setting["temperature"]


def _predicted(bench: Values, setting: Values) -> LedgerEntry:
    exact = setting["exact"]
    return LedgerEntry(
        kind=PREDICTED,
        source=_where(bench),
        tau=exact["tau"],
        prompts=exact["prompts"],
        interval=_pair(exact["tau_interval"]),
        definition=f"{setting['definition']}; exact, by replay over the verifier's own responses",
    )


def _trained(trained: TrainedTau, setting: Values | None) -> LedgerEntry:
    entry = LedgerEntry(
        kind=TRAINED,
        source=f"update {trained.step}",
        tau=trained.tau,
        prompts=None if setting is None else setting["exact"]["prompts"],
        interval=None,
        definition="as predicted, of the model in training's own precision",
    )
    if setting is None:
        return attrs.evolve(entry, note="not compared: the run has no benchmark of this setting")
    return _judged(entry, setting["exact"]["tau"], _pair(setting["exact"]["tau_interval"]))


def _live(bench: Values, setting: Values) -> LedgerEntry:
    live = setting["live"]
    agreement, acceptance = live["agreement"], live["acceptance"]
    entry = LedgerEntry(
        kind=MEASURED,
        source=_where(bench),
        tau=acceptance["tau"],
        prompts=acceptance["prompts"],
        interval=_pair(acceptance["tau_interval"]),
        definition=f"{setting['definition']}; counted in a live decode; criterion: {agreement['criterion']}",
        note=agreement["untold"],
    )
    if agreement["verdict"] == TOO_FEW:
        return entry
    return attrs.evolve(
        entry,
        expected=agreement["predicted_tau"],
        tolerance=_pair(agreement["interval"]),
        gap=f"{agreement['gap']}; {CAUSES[MEASURED]}" if agreement["gap"] else "",
    )


def _served(pair: tuple[Values, Values], bench: Values | None, setting: Values | None) -> LedgerEntry:
    result, served = pair
    acceptance = served["acceptance"]
    entry = LedgerEntry(
        kind=SERVED,
        source=f"{result['engine']} {result['version']}",
        tau=acceptance["tau"],
        prompts=acceptance["prompts"],
        interval=_pair(acceptance["tau_interval"]),
        definition=served["definition"],
    )
    if bench is None or setting is None:
        return attrs.evolve(
            entry, note="not compared: nothing is predicted; spec bench RUN with this --k, --temperature"
        )
    if bench["max_new_tokens"] != result["max_new_tokens"]:
        words = f"answers of up to {result['max_new_tokens']} tokens, predicted are {bench['max_new_tokens']}"
        return attrs.evolve(entry, note=f"not compared: {words}")
    if setting["prompts_digest"] != served["suite_digest"]:
        return attrs.evolve(entry, note="not compared: the suite's prompts are others now")
    if served["temperature"] > 0:
        return attrs.evolve(entry, note=f"not compared: {SAMPLED}")
    ids = served["prompt_ids"]
    sums = np.array([setting["by_prompt"][name] for name in ids], dtype=np.float64)
    expected = float(sums[:, 0].sum() / sums[:, 1].sum())
    if served["by_prompt"] is None:
        return _judged(entry, expected, bootstrap_ratio(sums[:, 0], sums[:, 1], level=LEVEL), served, setting)
    own = np.array([served["by_prompt"][name] for name in ids], dtype=np.float64)
    low, high = bootstrap_difference(sums, own, level=LEVEL)
    # The interval of the difference, put where served would have to lie were there none.
    difference = entry.tau - expected
    return _judged(entry, expected, (expected + difference - high, expected + difference - low), served, setting)


def _judged(
    entry: LedgerEntry,
    expected: float,
    interval: tuple[float, float] | None,
    served: Values | None = None,
    setting: Values | None = None,
) -> LedgerEntry:
    """Returns the entry compared with what is expected: within the interval, or within rounding."""
    low, high = interval or (expected, expected)
    low, high = min(low, expected * (1 - ROUNDING)), max(high, expected * (1 + ROUNDING))
    gap = ""
    if not low <= entry.tau <= high:
        words = f"{entry.tau:.3f} where {expected:.3f} is predicted on the same prompts ({low:.3f} to {high:.3f})"
        gap = f"{words}: {CAUSES[entry.kind]}"
        if entry.tau > expected:
            gap = f"{words}: {MORE}"
        elif served is not None and setting is not None and served["acceptance"]["by_position"]:
            first, wanted = served["acceptance"]["by_position"][0], setting["exact"]["by_position"][0]
            gap += f"; {FIRST_POSITION if first < 0.9 * wanted else LATER_POSITIONS}"
    return attrs.evolve(entry, expected=expected, tolerance=(low, high), gap=gap)


def _where(bench: Values) -> str:
    return f"{bench['dtype']}, {bench['device']}"


def _pair(value: Sequence[float | None] | None) -> tuple[float, float] | None:
    low, high = value or (None, None)
    return None if low is None or high is None else (low, high)
