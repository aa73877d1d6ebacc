"""The notes under the acceptance table."""

from __future__ import annotations

import attrs
import made_results

from speculators.bench.result import Setting
from speculators.report.bench import notes


def setting(k: int, cost: float | None = None) -> Setting:
    """One K, and the cost of one more drafted token by its rounds and those of the smallest K."""
    return made_results.setting(num_speculative_tokens=k, drafted_cost=cost)


def test_the_cost_of_one_more_drafted_token_is_reported() -> None:
    """The largest K gives it, over the widest range; without a cost there is no line."""
    settings = [setting(3), setting(5, 0.12), setting(7, 0.10)]
    (cost,) = [line for _, line in notes(settings) if "costs" in line]
    assert cost.startswith("from the rounds of K=3 and K=7: one more drafted token costs 0.10 of a token")
    assert not any("costs" in line for _, line in notes([setting(3), setting(5)]))


def test_a_criterion_that_was_not_judged_is_not_a_failure() -> None:
    """Too few prompts give a note, in its style, with the option that takes more."""
    live = made_results.live(own_tau=1.25, untold="3 prompts are too few to tell")
    lines = notes([attrs.evolve(setting(3), live=live)])
    assert ("note", "K=3: 3 prompts are too few to tell (--live N takes more)") in lines
    assert any("over the verifier's own responses replay predicts 1.2500" in line for _, line in lines)


def test_replaced_answers_are_reported_with_the_consequence() -> None:
    """Tau is measured on different text; the note is absent if no answer was replaced."""
    assert not any("answers of the suite" in line for _, line in notes([setting(3)]))
    replaced = attrs.evolve(setting(3), replaced_prompts=12)
    (line,) = [line for _, line in notes([replaced]) if "answers of the suite" in line]
    assert line.startswith("12 answers of the suite are not this verifier's output")
    assert "tau is measured on different text" in line
