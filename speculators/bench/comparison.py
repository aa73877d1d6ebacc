"""Benchmarks of several speculators side by side: a row for each drafter and setting, compared with the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from speculators.bench.paired import PairedDifference, paired_difference
from speculators.bench.result import Acceptance, BaselineRow, BenchResult, Setting, jsonable
from speculators.bench.speed import Speed


@attrs.frozen(kw_only=True)
class ComparedSpeculator:
    """One speculator of a comparison.

    Attributes:
        name: as rows show it.
        verifier: identifies the model that it was measured with, by content or by where it is published.
        template: identifies what was changed in the model's chat template.
        results: the settings that were asked for, of one benchmark or of several.
    """

    name: str
    verifier: str
    template: str
    results: tuple[BenchResult, ...]


@attrs.frozen(kw_only=True)
class ComparedRow:
    """One drafter in one setting.

    Attributes:
        speculator: the name of the speculator that was measured.
        baseline: the drafter measured beside it that this row is about; "" for the speculator itself.
        setting: of the speculator.
        acceptance: of the row's drafter.
        speed: None where it was not timed.
        difference: its acceptance length minus that of the first speculator; None for that itself, and where the two
            are not compared.
        incomparable: why they are not, or "".
    """

    speculator: str
    baseline: str
    setting: Setting
    acceptance: Acceptance
    speed: Speed | None
    difference: PairedDifference | None
    incomparable: str


@attrs.frozen(kw_only=True)
class BenchComparison:
    """Several speculators on the same suites, K and temperatures.

    Attributes:
        speculators: what was measured; the others are compared with the first.
        rows: by suite and temperature; the baselines of a speculator follow it, without those listed for one before.
    """

    speculators: tuple[ComparedSpeculator, ...]
    rows: tuple[ComparedRow, ...]

    @property
    def first(self) -> str:
        """The name of the speculator that the others are compared with."""
        return self.speculators[0].name

    @property
    def agrees(self) -> bool:
        """Whether live agrees with replay in all results."""
        return all(result.agrees for each in self.speculators for result in each.results)

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, NaN to null."""
        return {
            "first": self.first,
            "speculators": [
                {
                    "name": each.name,
                    "verifier": each.verifier,
                    "template": each.template,
                    "results": [result.to_json() for result in each.results],
                }
                for each in self.speculators
            ],
            "differences": [
                {
                    "speculator": row.speculator,
                    "baseline": row.baseline,
                    "suite": row.setting.suite,
                    "num_speculative_tokens": row.setting.num_speculative_tokens,
                    "temperature": row.setting.temperature,
                    "difference": jsonable(attrs.asdict(row.difference)) if row.difference else None,
                    "incomparable": row.incomparable,
                }
                for row in self.rows
            ],
        }


@attrs.frozen(kw_only=True)
class _Measured:
    """A setting, with whose it is and the benchmark that holds it."""

    speculator: ComparedSpeculator
    result: BenchResult
    setting: Setting


def compare_benches(speculators: Sequence[ComparedSpeculator]) -> BenchComparison:
    """Puts the settings of all speculators side by side, and compares each with the first's."""
    measured = [
        _Measured(speculator=each, result=result, setting=setting)
        for each in speculators
        for result in each.results
        for setting in result.settings
    ]
    measured.sort(key=lambda each: each.setting.num_speculative_tokens)
    references = {each.setting.key: each for each in measured if each.speculator is speculators[0]}
    rows: list[ComparedRow] = []
    settings = (setting for each in speculators for result in each.results for setting in result.settings)
    for place in dict.fromkeys((setting.suite, setting.temperature) for setting in settings):
        there = [each for each in measured if (each.setting.suite, each.setting.temperature) == place]
        for speculator in speculators:
            own = [each for each in there if each.speculator is speculator]
            rows += [_row(each, references.get(each.setting.key)) for each in own]
            rows += _new_baselines(own, references, rows)
    return BenchComparison(speculators=tuple(speculators), rows=tuple(rows))


def _new_baselines(
    own: Sequence[_Measured], references: dict[tuple[str, int, float], _Measured], rows: Sequence[ComparedRow]
) -> Iterator[ComparedRow]:
    """Yields the baselines of a speculator, by name, without those that an earlier one has with the same counts."""
    listed = {(row.setting.key, row.baseline, row.acceptance.tokens, row.acceptance.rounds) for row in rows}
    names = dict.fromkeys(baseline.name for each in own for baseline in each.setting.baselines)
    for name in names:
        for each in own:
            for baseline in each.setting.baselines:
                key = (each.setting.key, name, baseline.acceptance.tokens, baseline.acceptance.rounds)
                if baseline.name == name and key not in listed:
                    yield _row(each, references.get(each.setting.key), baseline)


def _row(each: _Measured, reference: _Measured | None, baseline: BaselineRow | None = None) -> ComparedRow:
    """Makes the row of a speculator, or of a baseline that was measured beside it."""
    setting = each.setting
    drafter = setting if baseline is None else baseline
    reason, difference = "", None
    if drafter is not setting or reference is not each:
        reason = _incomparable(each, reference)
        if not reason and reference is not None:
            difference = paired_difference(reference.setting.by_prompt, drafter.by_prompt)
            lacking = "fewer than two prompts" if drafter.by_prompt else "its result has no counts by prompt"
            reason = "" if difference else lacking
    speed = baseline.speed if baseline is not None else setting.live.speed if setting.live else None
    return ComparedRow(
        speculator=each.speculator.name,
        baseline="" if baseline is None else baseline.name,
        setting=setting,
        acceptance=setting.exact if baseline is None else baseline.acceptance,
        speed=speed,
        difference=difference,
        incomparable=reason,
    )


def _incomparable(each: _Measured, reference: _Measured | None) -> str:
    """Says why a difference from the reference would not come from the drafts alone; "" if it would."""
    if reference is None:
        return "the first was not measured there"
    one, other = reference, each
    reasons = {
        # A folder may hold what another recipe names as a GGUF file.
        "another verifier": one.speculator.verifier != other.speculator.verifier
        and one.result.verifier != other.result.verifier,
        "another chat template": one.speculator.template != other.speculator.template,
        "another precision": one.result.dtype != other.result.dtype,
        "other prompts": one.setting.prompts_digest != other.setting.prompts_digest,
        "answers of another length": one.result.max_new_tokens != other.result.max_new_tokens,
        "another definition of tau": one.setting.definition != other.setting.definition,
    }
    return ", ".join(reason for reason, applies in reasons.items() if applies)
