"""The entries of a run's ledger: each number beside its prediction, with the likely causes where the two part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import attrs
import numpy as np

from speculators.bench.referee import TOO_FEW
from speculators.bench.result import BenchResult, Live, Setting
from speculators.bench.statistics import bootstrap_difference, bootstrap_ratio
from speculators.servers.result import ServedResult, ServedSetting

IN_TRAINING, PREDICTED, MEASURED, SERVED = "predicted in training", "predicted", "measured live", "served"
# An interval paired by prompt is narrow where two sides differ by a round or two: a gap below this share of tau is
# rounding.
ROUNDING = 0.01
LEVEL = 0.99
# The first position counts as lower where it is below this share of its prediction.
FIRST_POSITION_SHARE = 0.9

CAUSES = {
    IN_TRAINING: "the exported weights are not those of the checkpoint that was evaluated, or they are rounded (dtype)",
    MEASURED: "the step-by-step decode does not compute what was trained: check its cache, its positions and the "
    "states it receives; over the verifier's own responses, also the temperature they were generated at",
    SERVED: "another speculator or verifier is served; the engine reads other layers (ids off by one), another RoPE "
    "(theta, scaling, partial factor), or a shorter max_position_embeddings than was trained; it ignores an option of "
    "config.json (norms); a vocabulary map or head comes from another run; or it has 16-bit weights where float32 was "
    "measured (spec bench --audit compares the server round for round)",
}
TOO_MANY_ACCEPTED = (
    "more drafts are accepted than can be: another speculator is served, or its output is not the verifier's own"
)
FIRST_POSITION = (
    "acceptance is already lower at the first draft: check layer ids, token or position shifts, vocabulary map, head"
)
LATER_POSITIONS = (
    "the first draft is accepted as predicted, later ones are not: check the state that a depth passes on and its "
    "position"
)
# vLLM's draft_sample_method is "greedy" unless it is configured, and no server reports which one it uses.
SAMPLED = (
    "above T=0 a server may draft its likeliest token, as vLLM does by default, whereas the prediction is for sampled "
    "drafts: a different quantity over different answers; a gap at T=0 is the one that points to a fault"
)


@attrs.frozen(kw_only=True)
class LedgerEntry:
    """One acceptance length of one (suite, K, T).

    Attributes:
        kind: IN_TRAINING, PREDICTED, MEASURED or SERVED.
        source: device and dtype, engine and version, or the update.
        tau: the acceptance length.
        prompts: number of prompts it is over; None where that is not known.
        interval: 95%, bootstrap over prompts; None where there is none.
        definition: how it was obtained.
        expected: the prediction for the same prompts; None where nothing is predicted.
        tolerance: the range that `tau` must lie in; None where it was compared round by round, or not at all.
        gap: what is wrong, or "".
        note: why it was not compared, or what else to know; or "".
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
class TrainedTau:
    """The acceptance length that training measured for the exported checkpoint, after update `step`."""

    suite: str
    num_speculative_tokens: int
    temperature: float
    tau: float
    step: int


def predicted_entry(bench: BenchResult, setting: Setting) -> LedgerEntry:
    """Makes the entry of the exact number, which others are compared with."""
    return LedgerEntry(
        kind=PREDICTED,
        source=_where(bench),
        tau=setting.exact.tau,
        prompts=setting.exact.prompts,
        interval=_finite(setting.exact.tau_interval),
        definition=f"{setting.definition}; exact, by replay over the verifier's own responses",
    )


def trained_entry(trained: TrainedTau, setting: Setting | None) -> LedgerEntry:
    """Compares training's number with the exact one, which holds for the exported weights."""
    entry = LedgerEntry(
        kind=IN_TRAINING,
        source=f"update {trained.step}",
        tau=trained.tau,
        prompts=None if setting is None else setting.exact.prompts,
        interval=None,
        definition="as predicted, of the model in training's own precision",
    )
    if setting is None:
        return attrs.evolve(entry, note="not compared: the run has no benchmark of this setting")
    return _compared(entry, setting.exact.tau, _finite(setting.exact.tau_interval))


def live_entry(bench: BenchResult, setting: Setting, live: Live) -> LedgerEntry:
    """Makes the entry of the live decode, with the verdict that its benchmark reached."""
    agreement, acceptance = live.agreement, live.acceptance
    entry = LedgerEntry(
        kind=MEASURED,
        source=_where(bench),
        tau=acceptance.tau,
        prompts=acceptance.prompts,
        interval=_finite(acceptance.tau_interval),
        definition=f"{setting.definition}; counted in a live decode; criterion: {agreement.criterion}",
        note=agreement.untold,
    )
    if agreement.verdict == TOO_FEW:
        return entry
    return attrs.evolve(
        entry,
        expected=agreement.predicted_tau,
        tolerance=_finite(agreement.interval),
        gap=f"{agreement.gap}; {CAUSES[MEASURED]}" if agreement.gap else "",
    )


def served_entry(
    result: ServedResult, served: ServedSetting, bench: BenchResult | None, setting: Setting | None
) -> LedgerEntry:
    """Compares a server's number with the exact one on the same prompts, paired by prompt where possible.

    Args:
        result: the benchmark of the server that `served` belongs to.
        bench: the in-process benchmark that `setting` belongs to; both are None where nothing is predicted.
    """
    entry = LedgerEntry(
        kind=SERVED,
        source=f"{result.engine} {result.version}",
        tau=served.acceptance.tau,
        prompts=served.acceptance.prompts,
        interval=_finite(served.acceptance.tau_interval),
        definition=served.definition,
    )
    if bench is None or setting is None:
        reason = "nothing is predicted; spec bench RUN with this --k and --temperature predicts it"
    elif bench.max_new_tokens != result.max_new_tokens:
        reason = f"the answers have up to {result.max_new_tokens} tokens, the prediction is for {bench.max_new_tokens}"
    elif setting.prompts_digest != served.suite_digest:
        reason = "the suite's prompts have changed since"
    elif served.temperature > 0:
        reason = SAMPLED
    else:
        return _compared_by_prompt(entry, served, setting)
    return attrs.evolve(entry, note=f"not compared: {reason}")


def _compared_by_prompt(entry: LedgerEntry, served: ServedSetting, setting: Setting) -> LedgerEntry:
    # A server may have answered a part of the suite: the prediction is for its prompts alone. [n, 2]: tokens, rounds.
    predicted = np.array([setting.by_prompt[name] for name in served.prompt_ids], dtype=np.float64)
    expected = float(predicted[:, 0].sum() / predicted[:, 1].sum())
    if served.by_prompt is None:
        interval = bootstrap_ratio(predicted[:, 0], predicted[:, 1], level=LEVEL)
    else:
        measured = np.array([served.by_prompt[name] for name in served.prompt_ids], dtype=np.float64)
        low, high = bootstrap_difference(predicted, measured, level=LEVEL)
        # The interval is that of the difference; shifted, it is the range for tau if there were no difference.
        difference = entry.tau - expected
        interval = (expected + difference - high, expected + difference - low)
    return _compared(entry, expected, interval, served, setting)


def _compared(
    entry: LedgerEntry,
    expected: float,
    interval: tuple[float, float] | None,
    served: ServedSetting | None = None,
    setting: Setting | None = None,
) -> LedgerEntry:
    """Compares an entry with its prediction: within the interval, or within rounding."""
    low, high = interval or (expected, expected)
    low, high = min(low, expected * (1 - ROUNDING)), max(high, expected * (1 + ROUNDING))
    gap = ""
    if not low <= entry.tau <= high:
        facts = f"{entry.tau:.3f} where {expected:.3f} is predicted on the same prompts ({low:.3f} to {high:.3f})"
        gap = f"{facts}: {CAUSES[entry.kind]}"
        if entry.tau > expected:
            gap = f"{facts}: {TOO_MANY_ACCEPTED}"
        elif served is not None and setting is not None and served.acceptance.by_position:
            measured, predicted = served.acceptance.by_position[0], setting.exact.by_position[0]
            gap += f"; {FIRST_POSITION if measured < FIRST_POSITION_SHARE * predicted else LATER_POSITIONS}"
    return attrs.evolve(entry, expected=expected, tolerance=(low, high), gap=gap)


def _where(bench: BenchResult) -> str:
    return f"{bench.dtype}, {bench.device}"


def _finite(interval: Sequence[float] | None) -> tuple[float, float] | None:
    low, high = interval or (math.nan, math.nan)
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None
