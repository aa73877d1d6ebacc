"""The result of a benchmark: frozen values with the definition beside every number, written to JSON and read back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from speculators.bench.bins import TokenBin
from speculators.bench.counts import Counts
from speculators.bench.paired import PairedDifference
from speculators.bench.referee import Agreement
from speculators.bench.replay import Replayed
from speculators.bench.speed import Speed
from speculators.bench.statistics import bootstrap_ratio
from speculators.recipe.expect import setting_key
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter
from speculators.recipe.tree import DynamicTree, TreeShape
from speculators.structure.faults import FloatOrNaN

# Raised when the meaning of a result changes, so that results of older code are measured again.
FORMAT = 5


@attrs.frozen(kw_only=True)
class Acceptance:
    """Acceptance length and rates over a set of responses; NaN where nothing was counted.

    Attributes:
        prompts: distinct prompts.
        tokens: tokens emitted by rounds.
        rounds: rounds; expected rounds where the numbers are exact.
        tau: tokens / rounds.
        tau_interval: 95%, bootstrap over prompts.
        drafted: mean tokens drafted per round; below K where the drafter may stop early.
        by_position: [K] probability that a round accepts its j-th draft.
        by_position_conditional: [K] the same, given that the round reached position j.
        by_position_interval: [K] 95% of `by_position`, bootstrap over prompts; older results have none.
    """

    prompts: int
    tokens: float
    rounds: float
    tau: FloatOrNaN
    tau_interval: tuple[FloatOrNaN, FloatOrNaN]
    drafted: FloatOrNaN
    by_position: tuple[FloatOrNaN, ...]
    by_position_conditional: tuple[FloatOrNaN, ...]
    by_position_interval: tuple[tuple[FloatOrNaN, FloatOrNaN], ...] = ()


@attrs.frozen(kw_only=True)
class PromptCounts:
    """The counts of one prompt over its turns; sums over prompts give every rate of a suite.

    Attributes:
        tokens, rounds, drafted: totals, as in `Counts`.
        reached, accepted: [K] rounds that judged, and that accepted, each depth.
    """

    tokens: float
    rounds: float
    drafted: float
    reached: tuple[float, ...]
    accepted: tuple[float, ...]


@attrs.frozen(kw_only=True)
class Live:
    """The live decode of a sample of the prompts.

    Attributes:
        acceptance: as counted in the decode.
        agreement: with replay on the same prompts.
        speed: against plain decoding.
    """

    acceptance: Acceptance
    agreement: Agreement
    speed: Speed


@attrs.frozen(kw_only=True)
class BaselineRow:
    """A training-free drafter on the same responses.

    Attributes:
        name: as `--against` takes it.
        acceptance: by replay, over all prompts of the suite.
        live_tau: acceptance length of the decode that gave `speed`; both are None where it was not decoded.
        counts_by_prompt: of each prompt; older results have none.
        difference: the speculator's acceptance length minus its; None where that cannot be paired by prompt.
    """

    name: str
    acceptance: Acceptance
    live_tau: float | None = None
    speed: Speed | None = None
    counts_by_prompt: dict[str, PromptCounts] = attrs.field(factory=dict)
    difference: PairedDifference | None = None

    @property
    def by_prompt(self) -> dict[str, tuple[float, float]]:
        """(tokens, rounds) of each prompt."""
        return {name: (each.tokens, each.rounds) for name, each in self.counts_by_prompt.items()}


@attrs.frozen(kw_only=True)
class TreeRow:
    """The speculator with drafted trees on the same responses, at T = 0.

    Attributes:
        name: the shape, as `--tree` takes it.
        nodes: tokens drafted per round.
        depth: the most levels.
        definition: as of `Setting`.
        exact: by replay, over all prompts of the suite; None where only live decoding knows the trees.
        by_prompt: (tokens, rounds) of each prompt by replay; empty without it.
        live: None where no live decode was asked for.
    """

    name: str
    nodes: int
    depth: int
    definition: str
    exact: Acceptance | None
    by_prompt: dict[str, tuple[float, float]]
    live: Live | None


@attrs.frozen(kw_only=True)
class Setting:
    """The numbers of one (suite, K, T).

    Attributes:
        prompts_digest: of the suite's prompts; equal digests mean the same questions.
        definition: how tau is counted, K, T and how drafts were sampled, in one line.
        note: anything else to know about the suite's prompts, or "".
        exact: by replay, over all prompts of the suite.
        by_category: acceptance of each category.
        by_prompt: (tokens, rounds) of each prompt; tau is the ratio of their sums.
        live: None where no live decode was asked for.
        cut_prompts: responses cut because they left the verifier's own greedy output.
        cut_tokens: tokens cut off.
        replaced_prompts: answers of the suite that are not this verifier's, measured on generated ones instead.
        drafted_cost: cost of one more drafted token, in tokens of plain decoding; see `with_drafted_costs`.
        by_context: by known tokens of prompt and answer, in rising order; older results have none.
        by_place: by known tokens of the answer, likewise.
        counts_by_prompt: of each prompt; older results have none.
        trees: measured beside the largest K at T = 0; empty elsewhere.
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
    drafted_cost: float | None = None
    by_context: tuple[TokenBin, ...] = ()
    by_place: tuple[TokenBin, ...] = ()
    counts_by_prompt: dict[str, PromptCounts] = attrs.field(factory=dict)
    trees: tuple[TreeRow, ...] = ()

    @property
    def key(self) -> tuple[str, int, float]:
        """(suite, K, T)."""
        return self.suite, self.num_speculative_tokens, self.temperature


@attrs.frozen(kw_only=True)
class BenchResult:
    """One benchmark of one speculator.

    Attributes:
        fingerprint: of the run's stage `bench`; None where `spec bench` measured.
        speculator: a folder or a run's name.
        verifier: the model it was measured with.
        device: where verifier and speculator ran, with `threads` CPU threads.
        dtype: the precision they ran in.
        seed: of sampling and of the bootstrap.
        others: CPUs that other processes used on average meanwhile, which makes times longer; None if unknown.
        agrees: whether live agrees with replay in every setting that was decoded live.
    """

    fingerprint: str | None = None
    speculator: str
    verifier: str
    device: str
    threads: int
    dtype: str
    seed: int
    max_new_tokens: int
    settings: tuple[Setting, ...]
    others: float | None = None
    format: int = FORMAT
    agrees: bool = attrs.field(init=False)

    @agrees.default
    def _agrees(self) -> bool:
        lives = [setting.live for setting in self.settings]
        lives += [tree.live for setting in self.settings for tree in setting.trees]
        return all(live is None or live.agreement.agrees for live in lives)

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, NaN to null; `structure(document, BenchResult)` reads them back."""
        document: dict[str, Any] = jsonable(attrs.asdict(self))
        if self.fingerprint is None:
            del document["fingerprint"]
        return document


def taus(settings: Iterable[Setting]) -> dict[str, float]:
    """Maps each setting, named as in `[expect]`, to its exact acceptance length."""
    return {setting_key(*setting.key): setting.exact.tau for setting in settings}


def with_drafted_costs(settings: Sequence[Setting]) -> tuple[Setting, ...]:
    """Fills in `drafted_cost` of the settings of one benchmark."""
    return tuple(attrs.evolve(setting, drafted_cost=drafted_cost(setting, settings)) for setting in settings)


def drafted_cost(setting: Setting, settings: Sequence[Setting]) -> float | None:
    """Computes the cost of one more drafted token, draft and verification, in tokens of plain decoding.

    Compares the duration of a setting's rounds with that of the smallest K on the same suite and temperature.

    Returns:
        None for the smallest K itself, where nothing was timed, and where the difference is noise.
    """
    timed = [
        each
        for each in settings
        if (each.suite, each.temperature) == (setting.suite, setting.temperature) and each.live
    ]
    smallest = min(timed, key=lambda each: each.num_speculative_tokens, default=setting)
    if smallest.live is None or setting.live is None or setting.exact.drafted <= smallest.exact.drafted:
        return None
    short, long = smallest.live.speed, setting.live.speed
    seconds = long.draft_seconds + long.verify_seconds - short.draft_seconds - short.verify_seconds
    # Seconds per drafted token times plain tokens per second: a count of plain tokens. 0 is noise, hence None.
    return max(0.0, seconds) / (setting.exact.drafted - smallest.exact.drafted) * long.plain or None


def definition(
    num_tokens: int, temperature: float, token_filter: TokenFilter = ALL_TOKENS, *, block_verification: bool = False
) -> str:
    """Formats the line that is printed beside every acceptance length.

    Results are compared by it, so another wording makes every earlier result incomparable.
    """
    whole = "whole " if token_filter.on else ""
    drafts = (
        "greedy (argmax)"
        if temperature == 0
        else f"sampled from the draft's own {whole}distribution at T={temperature:g}"
    )
    # Greedy decoding accepts the same drafts by either rule.
    rule = ", verified as a block" if block_verification and temperature > 0 else ""
    return (
        "tau = tokens emitted a round, the verifier's own (bonus) token counted; the first token comes from the "
        f"prefill and belongs to no round; K={num_tokens}, {sampling(temperature, token_filter)}; "
        f"drafts: a chain, {drafts}{rule}"
    )


def tree_definition(shape: TreeShape, depth: int) -> str:
    """Formats the same line for drafted trees, which are measured at T = 0; `depth` is the most levels of a round."""
    counted, _, _ = definition(depth, 0.0).partition("; K=")
    if isinstance(shape, DynamicTree):
        drafts = f"the {shape.nodes} nodes that the draft finds most likely, on up to {depth} levels"
    else:
        drafts = f"{shape.nodes} nodes on {depth} levels, the draft's most likely tokens below each"
    return f"{counted}; T=0; drafts: a tree {shape.name}, {drafts}"


def sampling(temperature: float, token_filter: TokenFilter) -> str:
    """Formats how the verifier samples: T and, above 0, the filter."""
    filters = f", the verifier's {token_filter}" if temperature > 0 and token_filter.on else ""
    return f"T={temperature:g}{filters}"


def summarize(counts: Counts, ids: tuple[str, ...], *, seed: int) -> Acceptance:
    """Summarises a set of responses.

    Args:
        ids: [n] the prompt of each response.
        seed: of the bootstrap.
    """
    return Acceptance(
        prompts=len(set(ids)),
        tokens=float(counts.tokens.sum()),
        rounds=float(counts.rounds.sum()),
        tau=counts.tau,
        # Turns of one prompt are resampled together: their acceptance is not independent.
        tau_interval=bootstrap_ratio(counts.tokens, counts.rounds, groups=ids, seed=seed),
        drafted=counts.drafted_per_round,
        by_position=counts.by_position,
        by_position_conditional=counts.by_position_conditional,
        by_position_interval=tuple(
            bootstrap_ratio(accepted, counts.rounds, groups=ids, seed=seed) for accepted in counts.accepted.T
        ),
    )


def summarize_categories(replayed: Replayed, counts: Counts, *, seed: int) -> dict[str, Acceptance]:
    """Summarises each category, in order of first appearance."""
    summaries: dict[str, Acceptance] = {}
    for category in dict.fromkeys(replayed.categories):
        rows = [row for row, each in enumerate(replayed.categories) if each == category]
        summaries[category] = summarize(counts.select(rows), tuple(replayed.ids[row] for row in rows), seed=seed)
    return summaries


def sums_by_prompt(counts: Counts, ids: tuple[str, ...]) -> dict[str, tuple[float, float]]:
    """Adds up tokens and rounds of each prompt over its turns."""
    sums: dict[str, tuple[float, float]] = {}
    for name, tokens, rounds in zip(ids, counts.tokens.tolist(), counts.rounds.tolist(), strict=True):
        before = sums.get(name, (0.0, 0.0))
        sums[name] = (before[0] + tokens, before[1] + rounds)
    return sums


def counts_by_prompt(counts: Counts, ids: tuple[str, ...]) -> dict[str, PromptCounts]:
    """Adds up the counts of each prompt over its turns."""
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(ids):
        rows.setdefault(name, []).append(row)
    return {name: _of_prompt(counts.select(each)) for name, each in rows.items()}


def _of_prompt(counts: Counts) -> PromptCounts:
    return PromptCounts(
        tokens=float(counts.tokens.sum()),
        rounds=float(counts.rounds.sum()),
        drafted=float(counts.drafted.sum()),
        reached=tuple(counts.reached.sum(axis=0).tolist()),
        accepted=tuple(counts.accepted.sum(axis=0).tolist()),
    )


def jsonable(value: Any) -> Any:
    """Replaces tuples with lists, and NaN and infinities with None: JSON has none of them."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
