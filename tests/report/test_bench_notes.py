"""The notes under the acceptance table."""

from __future__ import annotations

from pathlib import Path

import attrs
import made_results
import pytest

from speculators.bench.conclusion import conclude
from speculators.bench.result import BaselineRow, Setting
from speculators.report.conclusion import conclusion, conclusion_line, notes


def setting(k: int, cost: float | None = None) -> Setting:
    """One K, and the cost of one more drafted token by its rounds and those of the smallest K."""
    return made_results.setting(num_speculative_tokens=k, drafted_cost=cost)


def timed(k: int, speed_up: float, **changes: object) -> Setting:
    """One K with its speed-up."""
    live = attrs.evolve(made_results.live(), speed=made_results.speed(speed_up=speed_up, **changes))
    return attrs.evolve(setting(k), live=live)


def test_the_cost_of_an_extra_draft_is_reported_with_what_it_has_to_gain() -> None:
    """The largest K gives it, over the widest range; faster decoding raises what a draft has to gain."""
    settings = [timed(3, 1.5), attrs.evolve(timed(5, 1.2), drafted_cost=0.1)]
    (cost,) = [line for _, line in notes(settings) if "costs" in line]
    assert cost == (
        "each extra draft costs 10% of a plain step and pays if accepted more than 15% of the time: best K here is 3"
    )
    assert not any("costs" in line for _, line in notes([setting(3), setting(5)]))


def test_the_live_check_stands_beside_its_prediction() -> None:
    """On so many prompts: the measured and the predicted acceptance length; the criterion where it is asked for."""
    assert ("note", "K=3: live check on 3 prompts: 1.900, predicted 1.900") in notes([setting(3)], wide=False)
    assert ("note", "K=3: live check on 3 prompts: 1.900, predicted 1.900 (round for round)") in notes([setting(3)])


def test_it_is_said_what_the_speed_ups_were_measured_on() -> None:
    """On how many prompts, and in which dtype where the clock ran in another one than the check."""
    said = "speed-ups: rounds timed on 3 prompts, at the whole suite's tau"
    assert ("note", said) in notes([setting(3)])
    other = notes([timed(3, 1.2, dtype="bfloat16", near_ties=1)])
    said = "speed-ups: rounds timed on 3 prompts in bfloat16, at the whole suite's tau"
    assert (
        "note",
        f"{said}; there, answers leave the verifier's own at a near-tie of its logits: 1 of 3 at K=3",
    ) in other


def test_a_speed_up_beyond_tau_is_called_unreliable() -> None:
    """The note of a speculator or a baseline names the number and the likely cause."""
    speed = made_results.speed(speed_up=1.95, unmatched_baseline=True)
    baseline = BaselineRow(name="ngram", acceptance=made_results.acceptance(), live_tau=1.5, speed=speed)
    fast = attrs.evolve(timed(5, 1.95, unmatched_baseline=True), baselines=(baseline,))
    said = "1.95x: more than tau allows, timing unreliable (machine busy?)"
    assert [line for style, line in notes([fast]) if style == "warn"] == [f"K=5: {said}", f"ngram: {said}"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ([timed(3, 0.99), timed(5, 1.01)], "K = 5: 1.90 tokens a pass, 1.01x here."),
        ([timed(3, 0.85)], "K = 3: 1.90 tokens a pass, 0.85x here (slower than plain)."),
        ([timed(3, 1.2), timed(5, 1.95, unmatched_baseline=True)], "K = 3: 1.90 tokens a pass, 1.20x here."),
        ([timed(5, 1.95, unmatched_baseline=True)], "K = 5: 1.90 tokens a pass, its time is unreliable."),
        ([attrs.evolve(setting(3), live=None)], "K = 3: 1.90 tokens a pass, its speed was not measured."),
    ],
)
def test_the_conclusion_is_one_sentence(settings: list[Setting], sentence: str) -> None:
    """The best K, tokens a pass, and the speed-up here; a time that cannot be trusted decides nothing."""
    assert conclusion_line(conclude(settings)) == sentence


def test_the_next_commands_name_the_run() -> None:
    """Export and report, or the doctor where live and replay disagree; in ./runs by its name, elsewhere by its path."""
    run = Path("runs/mine-1a2b")
    good = made_results.bench_result(timed(3, 1.2), attrs.evolve(timed(3, 0.9), temperature=1.0))
    assert str(conclusion(good, run)).strip().splitlines() == [
        "mine, T=0: K = 3: 1.90 tokens a pass, 1.20x here.",
        "mine, T=1: K = 3: 1.90 tokens a pass, 0.90x here (slower than plain).",
        "Next: spec export mine-1a2b, spec report mine-1a2b",
    ]
    bad = made_results.bench_result(attrs.evolve(setting(3), live=made_results.live(gap="round 2")))
    assert str(conclusion(bad, Path("/else/mine"))).splitlines()[-1] == "Next: spec doctor /else/mine"
    assert len(str(conclusion(bad, None)).strip().splitlines()) == 1


def test_a_criterion_that_was_not_judged_is_not_a_failure() -> None:
    """Too few prompts give a note, in its style, with the option that takes more."""
    live = made_results.live(own_tau=1.25, untold="3 prompts are too few to tell")
    lines = notes([attrs.evolve(setting(3), live=live)])
    assert ("note", "K=3: 3 prompts are too few to tell (--live N takes more)") in lines
    assert any("; 1.250 on the verifier's own answers" in line for _, line in lines)


def test_replaced_answers_are_reported_with_the_consequence() -> None:
    """Tau is measured on different text; the note is absent if no answer was replaced."""
    assert not any("answers of the suite" in line for _, line in notes([setting(3)]))
    replaced = attrs.evolve(setting(3), replaced_prompts=12)
    (line,) = [line for _, line in notes([replaced]) if "answers of the suite" in line]
    assert line.startswith("12 answers of the suite are not this verifier's output")
    assert "tau is measured on different text" in line
