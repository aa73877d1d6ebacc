"""What is said under the acceptance table."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.bench.referee import Agreement
from speculators.report.bench import notes


def setting(k: int, cost: float | None = None) -> dict[str, Any]:
    """One K, and what one more drafted token costs by its rounds and those of the smallest."""
    agreement = attrs.asdict(Agreement(criterion="round for round", predicted_tau=1.0)) | {"agrees": True}
    live = {"agreement": agreement, "acceptance": {"tau": 1.0, "prompts": 3}}
    return {
        "num_speculative_tokens": k,
        "cut_prompts": 0,
        "replaced_prompts": 0,
        "note": "",
        "live": live,
        "drafted_cost": cost,
    }


def test_the_cost_of_one_more_drafted_token_is_told():
    """That of the largest K, over the widest range; nothing where there is none."""
    settings = [setting(3), setting(5, 0.12), setting(7, 0.10)]
    (cost,) = [words for _, words in notes(settings) if "costs" in words]
    assert cost.startswith("from the rounds of K=3 and K=7: one more drafted token costs 0.10 of a token")
    assert not any("costs" in words for _, words in notes([setting(3), setting(5)]))


def test_what_could_not_be_judged_is_told_as_no_failure():
    """Too few prompts: in the note's style, with the option that takes more."""
    one = setting(3)
    one["live"]["agreement"] |= {"own_tau": 1.25, "untold": "3 prompts are too few to tell"}
    told = notes([one])
    assert ("note", "K=3: 3 prompts are too few to tell (--live N takes more)") in told
    assert any("over the verifier's own responses replay says 1.2500" in words for _, words in told)


def test_answers_that_were_replaced_are_told_with_what_follows():
    """The number is of other text than elsewhere; nothing is said where no answer was replaced."""
    one = setting(3)
    assert not any("answers of the suite" in words for _, words in notes([one]))
    (told,) = [words for _, words in notes([one | {"replaced_prompts": 12}]) if "answers of the suite" in words]
    assert told.startswith("12 answers of the suite are not this verifier's output")
    assert "tau is over other text" in told
