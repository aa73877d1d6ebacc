"""Acceptance is judged beside what needs no training, on the same places."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
import torch

from speculators.bench.rows import Response
from speculators.doctor.acceptance import check_acceptance, explained, untrained
from speculators.doctor.check import OK, SKIPPED, UNDECIDED, WARNING, WEAK, WRONG, Check, Diagnosis, Family
from speculators.doctor.trials import Trial

ALIGNMENT = Family("alignment")


def response(prompt: list[int], answer: list[int], name: str = "a") -> Response:
    return Response(id=name, category="", tokens=(*prompt, *answer), prompt_length=len(prompt))


def test_look_up_copies_what_followed_the_last_occurrence() -> None:
    """After 1 2 the prompt went on with 3 4, and so does the answer: both drafts at its first place are right."""
    (table,) = untrained([response([1, 2, 3, 4, 9, 1], [2, 3, 4, 5])], 2).lookup.tables
    assert table.tolist() == [[1, 1], [1, 0], [0, 0]]


def test_the_table_of_pairs_does_not_know_the_answer_itself() -> None:
    """5 follows 4 in the other answer: there that pair is unknown, here it is counted."""
    one, other = response([0], [4, 5, 4, 5]), response([0], [4, 5, 7], "b")
    first, second = untrained([one, other], 1).pairs.tables
    assert first.tolist() == [[1], [0], [1]]
    assert second.tolist() == [[1], [0]]
    (alone,) = untrained([one], 1).pairs.tables
    # Without another answer the table is empty, and the commonest token (4) stands in.
    assert alone.tolist() == [[0], [1], [0]]


@attrs.frozen
class Scored:
    """What `check_acceptance` reads of trials."""

    configured: Trial
    responses: list[Response]
    k: int = 1


def scored(rate: float) -> Any:
    """A draft that is right at a share of the places of answers in which every other token repeats a pair."""
    rng = np.random.default_rng(0)
    answers = []
    for index in range(6):
        fresh = rng.integers(100, 10_000, 60)
        answers.append(response([1], [int(token) for pair in fresh for token in (7, 8, pair)], str(index)))
    tables = tuple((rng.random((len(one.answer) - 1, 1)) < rate).astype(float) for one in answers)
    return Scored(Trial(tables, (), torch.empty(0)), answers)


@pytest.mark.parametrize(("rate", "result", "phrase"), [
    (0.05, WRONG, "near chance"), (0.33, WRONG, "near chance"), (0.9, OK, "Without training: prompt look-up tau"),
])  # fmt: skip
def test_a_draft_must_beat_what_needs_no_training(rate: float, result: str, phrase: str) -> None:
    """A table of pairs drafts 8 after 7, and 7 after anything new: two places of three."""
    check = check_acceptance(scored(rate))
    assert (check.result, phrase in check.evidence) == (result, True), check
    assert bool(check.todo) == (result != OK)


def test_a_draft_below_look_up_is_a_warning() -> None:
    """Answers that copy their prompt: look-up drafts nearly all of them, pairs of other answers none."""
    rng = np.random.default_rng(0)
    texts = [[int(token) for token in rng.integers(10, 10_000, 60)] for _ in range(4)]
    answers = [response([*text, 5], [5, *text], str(index)) for index, text in enumerate(texts)]
    tables = tuple((rng.random((60, 1)) < 0.5).astype(float) for _ in answers)
    scored_answers: Any = Scored(Trial(tables, (), torch.empty(0)), answers)
    check = check_acceptance(scored_answers)
    assert (check.result, check.evidence.partition(",")[0]) == (WARNING, "prompt look-up"), check


def diagnosis(*checks: Check) -> Diagnosis:
    return Diagnosis(speculator="", algorithm="", verifier="", prompts="", false_alarm=0.01, seconds=1.0, checks=checks)


@pytest.mark.parametrize(("result", "verdict"), [
    (OK, "healthy"), (WARNING, WEAK), (WRONG, "not healthy"), (SKIPPED, UNDECIDED),
])  # fmt: skip
def test_only_a_draft_that_drafts_is_called_healthy(result: str, verdict: str) -> None:
    """Nothing else is wrong; acceptance alone decides the verdict."""
    sound = Family("loads").ok("files", "")
    examined = diagnosis(sound, Check(family="alignment", name="acceptance", result=result, evidence="tau 1.1"))
    assert examined.verdict == verdict
    assert examined.to_json()["healthy"] == (verdict == "healthy")
    assert diagnosis(sound).verdict == UNDECIDED


def test_what_is_near_chance_is_explained_or_called_unexplained() -> None:
    """The other faults are named; without any, the check says that nothing explains it."""
    low = ALIGNMENT.wrong("acceptance", "near chance: tau 1.1", "train longer")
    fault = ALIGNMENT.wrong("projections", "k and v are swapped", "exchange them")
    check, _ = explained([low, fault])
    assert check.evidence.startswith("see alignment/projections: near chance")
    assert check.todo.startswith("fix alignment/projections first")
    (check,) = explained([low])
    assert check.evidence.startswith("unexplained: no other check fails")
    assert "train longer" in check.todo
