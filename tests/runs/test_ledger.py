"""The ledger: predicted, measured and served side by side, and an alarm where they part."""

from __future__ import annotations

import copy

import pytest

from speculators.bench.referee import TOO_FEW
from speculators.runs.ledger import MEASURED, PREDICTED, SERVED, TRAINED, TrainedTau, ledger

IDS = [str(number) for number in range(20)]
# Prompts of different lengths and different acceptance: 2 tokens a round on the whole.
BY_PROMPT = {name: (20.0 + 2 * index, 10.0 + (index % 5 - 2) + index) for index, name in enumerate(IDS)}


def _tau(sums):
    tokens, rounds = (sum(column) for column in zip(*sums.values(), strict=True))
    return tokens / rounds


def _bench(**changes):
    tau = _tau(BY_PROMPT)
    live = {
        "acceptance": {"tau": 1.9, "prompts": 3, "tau_interval": [1.8, 2.0]},
        "agreement": {
            "criterion": "round for round",
            "predicted_tau": 1.9,
            "interval": None,
            "gap": "",
            "untold": "",
            "verdict": "agrees",
        },
    }
    setting = {
        "suite": "mine",
        "prompts_digest": "d",
        "num_speculative_tokens": 3,
        "temperature": 0.0,
        "definition": "tau is",
        "exact": {"tau": tau, "prompts": 20, "tau_interval": [1.8, 2.2], "by_position": [0.6, 0.3, 0.1]},
        "by_prompt": copy.deepcopy(BY_PROMPT),
        "live": live,
        **changes,
    }
    return {"dtype": "float32", "device": "cpu", "max_new_tokens": 64, "settings": [setting]}


def _served(by_prompt, *, first=0.6, told=True, version="1", **changes):
    acceptance = {"tau": _tau(by_prompt), "prompts": len(by_prompt), "by_position": [first, 0.3, 0.1]}
    setting = {
        "suite": "mine",
        "suite_digest": "d",
        "prompt_ids": list(by_prompt),
        "num_speculative_tokens": 3,
        "temperature": 0.0,
        "definition": "as the server counts",
        "acceptance": {**acceptance, "tau_interval": [1.8, 2.2] if told else None},
        "by_prompt": by_prompt if told else None,
        **changes,
    }
    return {"engine": "vllm", "version": version, "max_new_tokens": 64, "settings": [setting]}


def _rounds(factor, ids=IDS):
    return {name: (BY_PROMPT[name][0], BY_PROMPT[name][1] * factor) for name in ids}


def _entry(lines, kind):
    (line,) = lines
    (found,) = [entry for entry in line.entries if entry.kind == kind]
    return found


def test_a_run_that_is_served_as_predicted_raises_no_alarm():
    """All four numbers of one setting, each with its definition; what was asked again stands once, by engine."""
    trained = TrainedTau(suite="mine", num_speculative_tokens=3, temperature=0.0, tau=_tau(BY_PROMPT), step=9)
    served = [_served(_rounds(1.3)), _served(_rounds(1.0)), _served(_rounds(1.0), version="2")]
    lines = ledger([_bench()], served, [trained])
    (line,) = lines
    assert [entry.kind for entry in line.entries] == [TRAINED, PREDICTED, MEASURED, SERVED, SERVED]
    assert [entry.source for entry in line.entries] == ["update 9", *["float32, cpu"] * 2, "vllm 1", "vllm 2"]
    assert all(entry.definition for entry in line.entries)
    assert line.alarms == ()


@pytest.mark.parametrize("told", [True, False])
def test_a_server_that_accepts_less_is_an_alarm_that_names_causes(told):
    """By prompt, or, where the server does not tell its rounds by prompt, by the sum alone."""
    (line,) = ledger([_bench()], [_served(_rounds(1.4), first=0.2, told=told)], ())
    (alarm,) = line.alarms
    assert alarm.startswith("mine, K=3, T=0: served (vllm 1): 1.4")
    assert "RoPE" in alarm
    assert "the first draft is accepted less already" in alarm
    (line,) = ledger([_bench()], [_served(_rounds(1.4), told=told)], ())
    assert "later ones are not" in line.alarms[0]


def test_pairing_by_prompt_sees_what_the_interval_over_prompts_hides():
    """Each prompt takes 3% more rounds: far within the spread of prompts, but no chance."""
    assert ledger([_bench()], [_served(_rounds(1.03), told=False)], ())[0].alarms == ()
    assert ledger([_bench()], [_served(_rounds(1.03))], ())[0].alarms != ()


def test_a_round_more_or_less_is_rounding():
    """Below one per cent nothing is said, however narrow the interval."""
    assert ledger([_bench()], [_served(_rounds(1.005))], ())[0].alarms == ()


def test_more_than_predicted_is_an_alarm_of_its_own():
    """No server accepts more than the speculator drafts right."""
    (line,) = ledger([_bench()], [_served(_rounds(0.7))], ())
    assert "another speculator is served, or its output is not the verifier's own" in line.alarms[0]


def test_a_part_of_the_suite_is_compared_on_its_own_prompts():
    """The first prompts may be easier than the whole suite."""
    part = IDS[:5]
    entry = _entry(ledger([_bench()], [_served(_rounds(1.0, part))], ()), SERVED)
    assert entry.expected == pytest.approx(_tau({name: BY_PROMPT[name] for name in part}))
    assert entry.gap == ""


@pytest.mark.parametrize(
    ("bench", "served", "note"),
    [
        ({"num_speculative_tokens": 5}, {}, "nothing is predicted"),
        ({}, {"suite_digest": "other"}, "prompts are others now"),
        ({"temperature": 1.0}, {"temperature": 1.0}, "a server may draft its likeliest token"),
    ],
)
def test_what_cannot_be_compared_says_why(bench, served, note):
    """Rather than being compared with something else."""
    lines = ledger([_bench(**bench)], [_served(_rounds(2.0), **served)], ())
    (entry,) = [entry for line in lines for entry in line.entries if entry.kind == SERVED]
    assert note in entry.note
    assert entry.expected is None
    assert all(line.alarms == () for line in lines)


def test_training_is_filed_under_each_k_that_it_measured():
    """The largest K by which it chose, and those of the same pass; one without a benchmark is not compared."""
    numbers = {1: 1.5, 2: 1.7, 3: _tau(BY_PROMPT)}
    trained = [
        TrainedTau(suite="mine", num_speculative_tokens=k, temperature=0.0, tau=tau, step=9)
        for k, tau in numbers.items()
    ]
    lines = ledger([_bench()], [], trained)
    found = {line.num_speculative_tokens: line.entries[0] for line in lines}
    assert {k: entry.tau for k, entry in found.items()} == numbers
    assert all(entry.kind == TRAINED for entry in found.values())
    assert found[3].expected == pytest.approx(numbers[3])
    assert "no benchmark of this setting" in found[1].note


def test_a_live_decode_of_too_few_prompts_is_not_compared():
    """Neither agreement nor alarm, and the line says why."""
    few = _bench()
    few["settings"][0]["live"]["agreement"] |= {"verdict": TOO_FEW, "untold": "3 prompts are too few to tell"}
    entry = _entry(ledger([few], [], []), MEASURED)
    assert (entry.expected, entry.gap, entry.note) == (None, "", "3 prompts are too few to tell")


def test_gaps_of_live_and_of_training_are_alarms_too():
    """The referee's own gap, and an export that is not what was trained."""
    wrong = _bench()
    wrong["settings"][0]["live"]["agreement"]["gap"] = "prompt 3, round 0"
    trained = TrainedTau(suite="mine", num_speculative_tokens=3, temperature=0.0, tau=3.0, step=9)
    (line,) = ledger([wrong], [], [trained])
    first, second = line.alarms
    assert "predicted in training (update 9): 3.000 where" in first
    assert "prompt 3, round 0; the step-by-step decode" in second
