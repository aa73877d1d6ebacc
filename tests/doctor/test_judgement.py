"""What the replays of all answers add up to: a finding, the likelier of two findings, or a suspicion."""

from __future__ import annotations

import attrs
import numpy as np
import torch

from speculators.doctor.alignment import Candidate, judge
from speculators.doctor.alternative import Alternative
from speculators.doctor.check import OK, SUSPECTED, WARNING, WRONG, Check, Diagnosis, Family
from speculators.doctor.paired import compare
from speculators.doctor.trials import Trial


def trial(right: list[int], *, places: int = 50) -> Trial:
    """One answer for each count: so many of its first drafts are accepted."""
    return Trial(tuple((np.arange(places) < count).astype(float)[:, None] for count in right), (), torch.empty(0))


CONFIGURED = trial([20] * 24)


def candidate(what: str, tried: Trial, *, common: bool, significant: bool = True) -> Candidate:
    alternative = Alternative(what, f"trained on {what}", f"write {what}", lambda _: tried, common)
    return Candidate(
        "layer ids", alternative, tried, trial=tried, comparison=compare(CONFIGURED, tried), significant=significant
    )


def judged(*candidates: Candidate) -> Check:
    return judge("layer ids", candidates, (CONFIGURED, CONFIGURED), 46).check


def test_the_commonest_fault_is_named_where_a_rarer_one_is_hardly_better() -> None:
    """[1, 14, 27] accepts one draft more than [1, 14, 26] in 24 answers: no evidence for the rarer fault."""
    shift = candidate("[1, 14, 26]", trial([24] * 24), common=True)
    rarer = candidate("[1, 14, 27]", trial([24] * 23 + [25]), common=False)
    check = judged(rarer, shift)
    assert (check.result, check.todo) == (WRONG, "write [1, 14, 26]")


def test_a_rarer_fault_is_named_where_it_is_clearly_better() -> None:
    """Two more of fifty drafts in each answer are evidence."""
    shift = candidate("[1, 14, 26]", trial([24] * 24), common=True)
    rarer = candidate("[1, 14, 27]", trial([26] * 24), common=False)
    assert judged(rarer, shift).todo == "write [1, 14, 27]"


def test_a_likely_common_fault_is_a_suspicion_and_not_healthy() -> None:
    """15 answers gain three drafts, 9 lose one: +7.5%, which chance seldom gives, but does not pass the level."""
    likely = trial([23] * 15 + [19] * 9)
    check = judged(candidate("[1, 14, 26]", likely, common=True, significant=False))
    assert check.result == WARNING
    assert check.evidence.startswith("perhaps trained on [1, 14, 26]: ")
    assert "without --quick" in check.todo
    assert check.todo.endswith("write [1, 14, 26]")
    sound = Family("alignment").ok("acceptance", "tau 1.6")
    diagnosis = Diagnosis(
        speculator="", algorithm="", verifier="", prompts="", false_alarm=0.01, seconds=1.0, checks=(sound, check)
    )
    assert (diagnosis.healthy, diagnosis.failed, diagnosis.verdict) == (False, False, SUSPECTED)
    assert attrs.evolve(diagnosis, checks=(sound,)).healthy


def test_what_explains_nothing_is_not_suspected() -> None:
    """A draft near chance gains a little from whatever weakens a broken part, and stays near chance."""
    broken = candidate("[1, 14, 26]", trial([23] * 20 + [19] * 4), common=True, significant=False)
    assert judged(broken).result == WARNING
    assert judged(attrs.evolve(broken, explains=False)).result == OK


def test_small_gains_and_what_one_of_many_shows_by_chance_are_not_suspected() -> None:
    """+1.7% is not worth a warning; p = 0.01 is rare for a common fault, but not for the best of 46."""
    small = candidate("[1, 14, 26]", trial([21] * 12 + [20] * 8 + [19] * 4), common=True, significant=False)
    assert judged(small).result == OK
    lucky = trial([24] * 15 + [18] * 9)
    assert 0.001 < compare(CONFIGURED, lucky).p < 0.05
    assert judged(candidate("[1, 14, 27]", lucky, common=False, significant=False)).result == OK
    assert judged(candidate("[1, 14, 26]", lucky, common=True, significant=False)).result == WARNING
    likely = trial([23] * 20 + [19] * 4)
    assert judged(candidate("[1, 14, 27]", likely, common=False, significant=False)).result == WARNING
