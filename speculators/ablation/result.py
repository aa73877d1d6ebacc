"""The result of an ablation: each arm's numbers, and its difference from the base, as frozen values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

import attrs
import numpy as np

from speculators.ablation.arms import Contest
from speculators.ablation.runs import FailedRun, MeasuredRun
from speculators.ablation.statistics import LEVEL, Sums, TauDifference, difference, seed_variance
from speculators.bench.result import definition, jsonable
from speculators.bench.statistics import holm
from speculators.structure.faults import FloatOrNaN

# Raised when the meaning of a value changes.
FORMAT = 1
# (arm, seed); a run that has not ended is missing.
Outcomes = Mapping[tuple[str, int], MeasuredRun | FailedRun]


@attrs.frozen(kw_only=True)
class ArmSeed:
    """One run of an arm.

    Attributes:
        run: its folder; "" where it failed.
        tau, first: acceptance length, and share of rounds that accept the first draft; None where it failed.
        training_minutes: None where they are not known.
        agrees: whether the live decode, if there was one, confirmed the number.
        failure: why it failed, or "".
    """

    seed: int
    run: str = ""
    tau: float | None = None
    first: FloatOrNaN | None = None
    training_minutes: float | None = None
    agrees: bool = True
    failure: str = ""


@attrs.frozen(kw_only=True)
class ArmResult:
    """One row of the table.

    Attributes:
        options: what the arm changes beyond the options of all arms.
        seeds: its runs that have ended.
        difference: from the base; None for the base, and where no seed has both.
        holds: whether the difference is significant at 5% over all variants together (Holm); None where it is not
            judged: one seed does not show how far tau moves between seeds.
    """

    name: str
    options: tuple[str, ...]
    seeds: tuple[ArmSeed, ...]
    difference: TauDifference | None = None
    holds: bool | None = None

    def mean(self, value: str) -> float | None:
        """Averages "tau", "first" or "training_minutes" over the seeds that have it; None if none does."""
        values = [number for seed in self.seeds if (number := getattr(seed, value)) is not None]
        return mean(values) if values else None

    @property
    def failures(self) -> dict[int, str]:
        """Why runs failed, by seed."""
        return {each.seed: each.failure for each in self.seeds if each.failure}


@attrs.frozen(kw_only=True)
class AblationResult:
    """An ablation, finished or not.

    Attributes:
        name: of the file, which is `file`.
        recipe: of the base; `options` change it for all arms.
        setting: the one that decides, "SUITE/K=5/T=0"; `definition` says how tau is counted there.
        prompts: measured in every run.
        seeds: with which a run has ended.
        seed_deviation: standard deviation of one run's tau between seeds, pooled over all arms; None with one seed.
        level: of the intervals.
        arms: the base, then variants by their difference, largest first.
        unfinished: runs that have not ended.
    """

    name: str
    file: str
    recipe: str
    options: tuple[str, ...]
    setting: str
    definition: str
    prompts: int
    seeds: tuple[int, ...]
    seed_deviation: float | None
    arms: tuple[ArmResult, ...]
    unfinished: int
    level: float = LEVEL
    format: int = FORMAT

    @property
    def is_sound(self) -> bool:
        """Whether every run ended with a number that live decoding does not contradict."""
        return not self.unfinished and all(not seed.failure and seed.agrees for arm in self.arms for seed in arm.seeds)

    @property
    def over_seeds(self) -> bool:
        """Whether the intervals are over seeds, too."""
        return self.seed_deviation is not None

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, NaN to null."""
        document: dict[str, Any] = jsonable(attrs.asdict(self))
        return document


def summarize_ablation(contest: Contest, outcomes: Outcomes) -> AblationResult:
    """Compares each variant with the base, over the seeds that both have."""
    base, section = contest.arms[0].name, contest.arms[0].recipe.benchmark
    measured = (each for each in outcomes.values() if isinstance(each, MeasuredRun))
    prompts = tuple(next((each.setting.by_prompt for each in measured), ()))
    outcomes = {key: _on_same_prompts(outcome, prompts) for key, outcome in outcomes.items()}
    sums = {
        arm.name: [_sums(outcomes.get((arm.name, seed)), prompts) for seed in contest.seeds] for arm in contest.arms
    }
    pooled = seed_variance(list(sums.values()))
    differences = {name: difference(sums[base], own, pooled) for name, own in sums.items() if name != base}
    judged = {name: each.p for name, each in differences.items() if each is not None and each.over_seeds}
    holds = dict(zip(judged, holm(list(judged.values()), level=1 - LEVEL), strict=True))
    first, *others = (
        ArmResult(
            name=arm.name,
            options=arm.options,
            seeds=tuple(_row(seed, outcomes[arm.name, seed]) for seed in contest.seeds if (arm.name, seed) in outcomes),
            difference=differences.get(arm.name),
            holds=holds.get(arm.name),
        )
        for arm in contest.arms
    )
    others.sort(key=lambda arm: -arm.difference.mean if arm.difference else math.inf)
    return AblationResult(
        name=contest.ablation.name,
        file=str(contest.ablation.path),
        recipe=contest.ablation.recipe,
        options=contest.ablation.document.set,
        setting=contest.setting,
        definition=definition(
            contest.k,
            contest.temperature,
            section.token_filter,
            block_verification=section.block_verification,
        ),
        prompts=len(prompts),
        seeds=tuple(seed for seed in contest.seeds if any((arm.name, seed) in outcomes for arm in contest.arms)),
        seed_deviation=pooled.variance**0.5 if pooled.freedom else None,
        arms=(first, *others),
        unfinished=len(contest.arms) * len(contest.seeds) - len(outcomes),
    )


def _on_same_prompts(outcome: MeasuredRun | FailedRun, prompts: Sequence[str]) -> MeasuredRun | FailedRun:
    if isinstance(outcome, FailedRun) or outcome.setting.by_prompt.keys() == set(prompts):
        return outcome
    return FailedRun(message=f"{outcome.folder.path}: it measured other prompts than the first run")


def _sums(outcome: MeasuredRun | FailedRun | None, prompts: Sequence[str]) -> Sums:
    """Tokens and rounds of each prompt, [n, 2]; None where the run is missing or failed."""
    if not isinstance(outcome, MeasuredRun):
        return None
    return np.array([outcome.setting.by_prompt[prompt] for prompt in prompts], dtype=np.float64)


def _row(seed: int, outcome: MeasuredRun | FailedRun) -> ArmSeed:
    if isinstance(outcome, FailedRun):
        return ArmSeed(seed=seed, failure=outcome.message)
    exact = outcome.setting.exact
    return ArmSeed(
        seed=seed,
        run=str(outcome.folder.path),
        tau=exact.tau,
        first=exact.by_position[0],
        training_minutes=outcome.training_minutes,
        agrees=outcome.agrees,
    )
