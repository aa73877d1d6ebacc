"""What a benchmark says: frozen values, the definition beside every number, JSON."""

from __future__ import annotations

import math
from typing import Any

import attrs

from speculators.bench.counts import Counts
from speculators.bench.referee import Agreement
from speculators.bench.replay import Replayed
from speculators.bench.speed import Speed
from speculators.bench.statistics import bootstrap_ratio

# Raised when what a result holds changes, so that results of older code are measured again.
FORMAT = 4


@attrs.frozen(kw_only=True)
class Acceptance:
    """Acceptance length and rates.

    Attributes:
        prompts: distinct prompts.
        tokens: emitted by rounds.
        rounds: expected ones where the numbers are exact.
        tau: tokens / rounds.
        tau_interval: 95%, bootstrap over prompts.
        drafted: mean tokens drafted a round; below K where the drafter may stop early.
        by_position: probability that a round accepts its j-th draft, j = 1..K.
        by_position_conditional: the same, given that the round reached position j.
    """

    prompts: int
    tokens: float
    rounds: float
    tau: float
    tau_interval: tuple[float, float]
    drafted: float
    by_position: tuple[float, ...]
    by_position_conditional: tuple[float, ...]


@attrs.frozen(kw_only=True)
class Live:
    """The live referee on a sample of the prompts.

    Attributes:
        agreement: with replay on the same prompts.
        speed: against plain decoding.
    """

    acceptance: Acceptance
    agreement: Agreement
    speed: Speed


@attrs.frozen(kw_only=True)
class BaselineRow:
    """A drafter without training on the same responses.

    Attributes:
        name: as `--against` takes it.
        live_tau: acceptance length of the decode that the speed is from; None, like `speed`, where it was not decoded.
    """

    name: str
    acceptance: Acceptance
    live_tau: float | None = None
    speed: Speed | None = None


@attrs.frozen(kw_only=True)
class Setting:
    """The numbers of one (suite, K, T).

    Attributes:
        prompts_digest: of the suite's prompts; equal digests are the same questions.
        definition: what tau counts, K, T and how drafts were sampled, in one line.
        note: what else a reader must know about the suite's prompts; "" if nothing.
        exact: by replay, over all prompts of the suite.
        by_category: acceptance of each category.
        by_prompt: tokens and rounds of each prompt, of which tau is the ratio of sums.
        cut_prompts: responses cut because they left the verifier's own greedy output.
        cut_tokens: tokens that were cut off.
        replaced_prompts: answers of the suite that are not this verifier's; generated ones were measured instead.
    """

    suite: str
    prompts_digest: str
    num_speculative_tokens: int
    temperature: float
    definition: str
    note: str
    exact: Acceptance
    by_category: dict[str, Acceptance]
    by_prompt: dict[str, tuple[float, float]]
    baselines: tuple[BaselineRow, ...]
    live: Live | None
    cut_prompts: int
    cut_tokens: int
    replaced_prompts: int


@attrs.frozen(kw_only=True)
class BenchResult:
    """One benchmark of one speculator.

    Attributes:
        speculator: what was measured (a folder or run name).
        verifier: that it was measured with.
        device: and threads, dtype: where and in which precision the verifier and the speculator ran.
        seed: of sampling and of the bootstrap.
    """

    speculator: str
    verifier: str
    device: str
    threads: int
    dtype: str
    seed: int
    max_new_tokens: int
    settings: tuple[Setting, ...]
    format: int = FORMAT

    @property
    def agrees(self) -> bool:
        """Whether live agrees with replay wherever it was asked."""
        return all(setting.live is None or setting.live.agreement.agrees for setting in self.settings)

    def drafted_cost(self, setting: Setting) -> float | None:
        """Returns what one more drafted token costs, draft and verification, in tokens without drafts.

        By the rounds of a setting against those of the smallest K of its suite and temperature; None for that one,
        where nothing was timed, and where the difference is noise.
        """
        alike = [
            each
            for each in self.settings
            if (each.suite, each.temperature) == (setting.suite, setting.temperature) and each.live
        ]
        few = min(alike, key=lambda each: each.num_speculative_tokens, default=setting)
        if few.live is None or setting.live is None or setting.exact.drafted <= few.exact.drafted:
            return None
        short, long = few.live.speed, setting.live.speed
        seconds = long.draft_seconds + long.verify_seconds - short.draft_seconds - short.verify_seconds
        return max(0.0, seconds) / (setting.exact.drafted - few.exact.drafted) * long.plain or None

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values; what is not a number (a position never reached) is null."""
        document: dict[str, Any] = jsonable(attrs.asdict(self))
        for each, setting in zip(document["settings"], self.settings, strict=True):
            if setting.live is not None:
                agreement = setting.live.agreement
                each["live"]["agreement"] |= {"agrees": agreement.agrees, "verdict": agreement.verdict}
            each["drafted_cost"] = self.drafted_cost(setting)
        return {**document, "agrees": self.agrees}


def definition(num_tokens: int, temperature: float) -> str:
    """Returns the line that is printed beside every acceptance length."""
    drafts = (
        "greedy (argmax)" if temperature == 0 else f"sampled from the draft's own distribution at T={temperature:g}"
    )
    return (
        "tau = tokens emitted a round, the verifier's own (bonus) token counted; the first token comes from the "
        f"prefill and belongs to no round; K={num_tokens}, T={temperature:g}; drafts: a chain, {drafts}"
    )


def summarize(counts: Counts, ids: tuple[str, ...], *, seed: int) -> Acceptance:
    """Returns the summary of a set of responses.

    Args:
        ids: the prompt of each.
        seed: of the bootstrap.
    """
    return Acceptance(
        prompts=len(set(ids)),
        tokens=float(counts.tokens.sum()),
        rounds=float(counts.rounds.sum()),
        tau=counts.tau,
        tau_interval=bootstrap_ratio(counts.tokens, counts.rounds, groups=ids, seed=seed),
        drafted=counts.drafted_per_round,
        by_position=counts.by_position,
        by_position_conditional=counts.by_position_conditional,
    )


def summarize_categories(replayed: Replayed, counts: Counts, *, seed: int) -> dict[str, Acceptance]:
    """Returns the summary of each category, in order of first appearance."""
    found: dict[str, Acceptance] = {}
    for category in dict.fromkeys(replayed.categories):
        rows = [row for row, held in enumerate(replayed.categories) if held == category]
        found[category] = summarize(counts.select(rows), tuple(replayed.ids[row] for row in rows), seed=seed)
    return found


def sums_by_prompt(counts: Counts, ids: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Returns tokens and rounds of each prompt, its turns added up."""
    found: dict[str, tuple[float, float]] = {}
    for name, tokens, rounds in zip(ids, counts.tokens.tolist(), counts.rounds.tolist(), strict=True):
        held = found.get(name, (0.0, 0.0))
        found[name] = (held[0] + tokens, held[1] + rounds)
    return found


def jsonable(value: Any) -> Any:
    """Returns the value with lists for tuples and None for what is not a number."""
    if isinstance(value, dict):
        return {key: jsonable(held) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(held) for held in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
