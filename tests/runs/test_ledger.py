"""The ledger puts predicted, measured and served numbers side by side, and raises an alarm where they differ."""

from __future__ import annotations

from typing import Any

import made_results
import pytest

from speculators.bench.result import BenchResult
from speculators.runs.ledger import LedgerLine, ledger_lines
from speculators.runs.ledger_entries import IN_TRAINING, MEASURED, PREDICTED, SERVED, LedgerEntry, TrainedTau
from speculators.servers.result import ServedResult

Sums = dict[str, tuple[float, float]]

IDS = [str(number) for number in range(20)]
# Prompts of different lengths and different acceptance: 2 tokens per round on the whole.
BY_PROMPT: Sums = {name: (20.0 + 2 * index, 10.0 + (index % 5 - 2) + index) for index, name in enumerate(IDS)}


def _tau(sums: Sums) -> float:
    tokens, rounds = (sum(column) for column in zip(*sums.values(), strict=True))
    return tokens / rounds


def _bench(**changes: Any) -> BenchResult:
    exact = made_results.acceptance(_tau(BY_PROMPT))
    return made_results.bench_result(made_results.setting(**({"exact": exact, "by_prompt": BY_PROMPT} | changes)))


def _served(
    by_prompt: Sums, *, first: float = 0.6, paired: bool = True, version: str = "1", **changes: Any
) -> ServedResult:
    acceptance = made_results.served_acceptance(
        _tau(by_prompt),
        prompts=len(by_prompt),
        by_position=(first, 0.3, 0.1),
        tau_interval=(1.8, 2.2) if paired else None,
    )
    values = {"prompt_ids": tuple(by_prompt), "acceptance": acceptance, "by_prompt": by_prompt if paired else None}
    return made_results.served_result(made_results.served_setting(**(values | changes)), version=version)


def _rounds(factor: float, ids: list[str] = IDS) -> Sums:
    return {name: (BY_PROMPT[name][0], BY_PROMPT[name][1] * factor) for name in ids}


def _entry(lines: list[LedgerLine], kind: str) -> LedgerEntry:
    (line,) = lines
    (entry,) = [entry for entry in line.entries if entry.kind == kind]
    return entry


def _trained(tau: float, k: int = 3) -> TrainedTau:
    return TrainedTau(suite="mine", num_speculative_tokens=k, temperature=0.0, tau=tau, step=9)


def test_a_run_that_is_served_as_predicted_raises_no_alarm() -> None:
    """All four numbers of a setting appear, each with its definition; of repeated benchmarks, the newest of each
    engine counts."""
    served = [_served(_rounds(1.3)), _served(_rounds(1.0)), _served(_rounds(1.0), version="2")]
    (line,) = ledger_lines([_bench()], served, [_trained(_tau(BY_PROMPT))])
    assert [entry.kind for entry in line.entries] == [IN_TRAINING, PREDICTED, MEASURED, SERVED, SERVED]
    assert [entry.source for entry in line.entries] == ["update 9", *["float32, cpu"] * 2, "vllm 1", "vllm 2"]
    assert all(entry.definition for entry in line.entries)
    assert line.alarms == ()


@pytest.mark.parametrize("paired", [True, False])
def test_a_server_that_accepts_less_raises_an_alarm_with_causes(paired: bool) -> None:
    """Numbers are compared by prompt or, if the server does not report rounds by prompt, by their sum."""
    (line,) = ledger_lines([_bench()], [_served(_rounds(1.4), first=0.2, paired=paired)], ())
    (alarm,) = line.alarms
    assert alarm.startswith("mine, K=3, T=0: served (vllm 1): 1.4")
    assert "RoPE" in alarm
    assert "acceptance is already lower at the first draft" in alarm
    (line,) = ledger_lines([_bench()], [_served(_rounds(1.4), paired=paired)], ())
    assert "later ones are not" in line.alarms[0]


def test_pairing_by_prompt_detects_a_gap_that_the_interval_over_prompts_hides() -> None:
    """Three per cent more rounds in each prompt are within the spread of prompts, but are not chance."""
    assert ledger_lines([_bench()], [_served(_rounds(1.03), paired=False)], ())[0].alarms == ()
    assert ledger_lines([_bench()], [_served(_rounds(1.03))], ())[0].alarms != ()


def test_a_round_more_or_less_is_rounding() -> None:
    """A gap below one per cent raises no alarm, however narrow the interval."""
    assert ledger_lines([_bench()], [_served(_rounds(1.005))], ())[0].alarms == ()


def test_more_than_predicted_is_an_alarm_of_its_own() -> None:
    """A server cannot accept more drafts than the speculator gets right."""
    (line,) = ledger_lines([_bench()], [_served(_rounds(0.7))], ())
    assert "another speculator is served, or its output is not the verifier's own" in line.alarms[0]


def test_a_part_of_the_suite_is_compared_on_its_own_prompts() -> None:
    """Only the prompts that both sides measured are compared, because the first ones may be easier than the rest."""
    part = IDS[:5]
    entry = _entry(ledger_lines([_bench()], [_served(_rounds(1.0, part))], ()), SERVED)
    assert entry.expected == pytest.approx(_tau({name: BY_PROMPT[name] for name in part}))
    assert entry.gap == ""


@pytest.mark.parametrize(
    ("bench", "served", "note"),
    [
        ({"num_speculative_tokens": 5}, {}, "nothing is predicted"),
        ({}, {"suite_digest": "other"}, "prompts have changed since"),
        ({"temperature": 1.0}, {"temperature": 1.0}, "a server may draft its likeliest token"),
    ],
)
def test_numbers_that_cannot_be_compared_say_why(bench: dict[str, Any], served: dict[str, Any], note: str) -> None:
    """They are never compared with a number of another setting instead."""
    lines = ledger_lines([_bench(**bench)], [_served(_rounds(2.0), **served)], ())
    (entry,) = [entry for line in lines for entry in line.entries if entry.kind == SERVED]
    assert note in entry.note
    assert entry.expected is None
    assert all(line.alarms == () for line in lines)


def test_training_has_a_row_for_each_k_that_it_measured() -> None:
    """The largest K, which chose the checkpoint, and the other K of that evaluation have rows; without a benchmark
    none is compared."""
    numbers = {1: 1.5, 2: 1.7, 3: _tau(BY_PROMPT)}
    lines = ledger_lines([_bench()], [], [_trained(tau, k) for k, tau in numbers.items()])
    entries = {line.num_speculative_tokens: line.entries[0] for line in lines}
    assert {k: entry.tau for k, entry in entries.items()} == numbers
    assert all(entry.kind == IN_TRAINING for entry in entries.values())
    assert entries[3].expected == pytest.approx(numbers[3])
    assert "no benchmark of this setting" in entries[1].note


def test_a_live_decode_of_too_few_prompts_is_not_compared() -> None:
    """It counts neither as agreement nor as an alarm, and the line says why."""
    few = _bench(live=made_results.live(untold="3 prompts are too few to tell"))
    entry = _entry(ledger_lines([few], [], []), MEASURED)
    assert (entry.expected, entry.gap, entry.note) == (None, "", "3 prompts are too few to tell")


def test_gaps_of_live_and_of_training_are_alarms_too() -> None:
    """A live decode that differs from replay, and an export that differs from the trained model, raise alarms."""
    wrong = _bench(live=made_results.live(gap="prompt 3, round 0"))
    (line,) = ledger_lines([wrong], [], [_trained(3.0)])
    first, second = line.alarms
    assert "predicted in training (update 9): 3.000 where" in first
    assert "prompt 3, round 0; the step-by-step decode" in second
