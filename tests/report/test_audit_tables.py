"""The tables of an audit, as they are printed."""

from __future__ import annotations

import io

import made_results
from rich.console import Console
from rich.theme import Theme

from speculators.report.audit import MOST_ROUNDS, audit_tables
from speculators.report.console import STYLES
from speculators.servers.audit import Explanation, Pattern


def _printed(**changes) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=80, theme=Theme(STYLES)).print(audit_tables(made_results.audit(**changes)), crop=False)
    return file.getvalue().splitlines()


def test_a_passed_audit_says_so_with_its_counts() -> None:
    """Rounds, near ties and both acceptance lengths stand in one line, and what a near tie is below."""
    lines = _printed()
    assert "the server drafts with this speculator: every round is as predicted" in lines
    (row,) = [line.split() for line in lines if line.split()[:2] == ["3", "20"]]
    assert row == ["3", "20", "640", "300", "298", "2", "0", "2.067", "2.067"]
    assert "a gap of at most 0.001 logits (float32)" in " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 80


def test_a_failed_audit_shows_the_first_rounds_what_they_share_and_what_explains_them() -> None:
    """The places count from 1, as people do; more rounds than fit are counted."""
    rounds = tuple(made_results.audited_round(number=number) for number in range(MOST_ROUNDS + 3))
    lines = _printed(
        differing=rounds,
        tally=made_results.tally(agreeing=287),
        patterns=(Pattern(what="always depth 2: 11 of 30 rounds that reach it differ", check="its cache"),),
        explanations=(Explanation(what="it reads other layers", todo="serve the run's", agreeing=300, explains=True),),
    )
    assert "11 of 300 rounds differ, first prompt p1, turn 1, round 1, depth 2" in lines
    (row,) = [line.split() for line in lines if line.split()[:3] == ["p1", "1", "1"]]
    assert row == ["p1", "1", "1", "24", "2", "1", "2", "1.25", "0.5"]
    assert "... 3 more; --json lists all" in lines
    assert "always depth 2: 11 of 30 rounds that reach it differ" in lines
    assert "  check its cache" in lines
    assert "it reads other layers: that predicts 300 of 300 rounds" in lines
    assert max(map(len, lines)) <= 80


def test_without_an_explanation_the_closest_are_shown() -> None:
    """Nobody takes a list of what was tried for a diagnosis."""
    tried = tuple(Explanation(what=f"fault {n}", todo="mend it", agreeing=250 - n, explains=False) for n in range(5))
    lines = _printed(differing=(made_results.audited_round(),), explanations=tried)
    assert "none of what servers often mistake predicts its rounds; the closest:" in lines
    assert [line for line in lines if "fault" in line] == ["  fault 0: 250 of 300", "  fault 1: 249 of 300"]
    assert "mend it" not in "".join(lines)


def test_tokens_of_another_verifier_are_said_to_be_so() -> None:
    """They fail an audit whose rounds all agree."""
    lines = _printed(tally=made_results.tally(foreign_tokens=7))
    assert any(line.startswith("7 of 640 tokens are not this verifier's choice") for line in lines)
