"""What is said under the acceptance table."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from speculators.bench.referee import Agreement
from speculators.report.bench import notes


def setting(k: int, draft: float, verify: float, drafted: float) -> dict[str, Any]:
    """One K whose rounds took `draft` and `verify` seconds; without drafts 20 tokens a second."""
    agreement = attrs.asdict(Agreement(criterion="round for round", predicted_tau=1.0)) | {"agrees": True}
    speed = {"draft_seconds": draft, "verify_seconds": verify, "plain": 20.0}
    live = {"agreement": agreement, "speed": speed, "acceptance": {"tau": 1.0, "prompts": 3}}
    told = {"cut_prompts": 0, "replaced_prompts": 0, "note": "", "exact": {"drafted": drafted}, "live": live}
    return {"num_speculative_tokens": k, **told}


def test_the_cost_of_one_more_drafted_token_is_told():
    """From the smallest to the largest K: 20 ms for 4 tokens more, so 5 ms each of the 50 that a token takes."""
    settings = [setting(3, 0.010, 0.050, 3.0), setting(5, 0.016, 0.054, 5.0), setting(7, 0.020, 0.060, 7.0)]
    (cost,) = [words for _, words in notes(settings) if "costs" in words]
    assert cost.startswith("from the rounds of K=3 and K=7: one more drafted token costs 0.10 of a token")


@pytest.mark.parametrize(
    "settings",
    [
        [setting(3, 0.01, 0.05, 3.0)],
        [setting(3, 0.01, 0.05, 3.0), setting(5, 0.01, 0.04, 5.0)],
        [setting(3, 0.01, 0.05, 2.0), setting(5, 0.02, 0.05, 2.0)],
    ],
    ids=["one K", "longer rounds were not slower", "as many drafted"],
)
def test_no_cost_is_told_where_none_can_be(settings):
    """A difference of noise is no cost."""
    assert not any("costs" in words for _, words in notes(settings))


def test_what_could_not_be_judged_is_told_as_no_failure():
    """Too few prompts: in the note's style, with the option that takes more."""
    one = setting(3, 0.01, 0.05, 3.0)
    one["live"]["agreement"] |= {"own_tau": 1.25, "untold": "3 prompts are too few to tell"}
    told = notes([one])
    assert ("note", "K=3: 3 prompts are too few to tell (--live N takes more)") in told
    assert any("over the verifier's own responses replay says 1.2500" in words for _, words in told)


def test_answers_that_were_replaced_are_told_with_what_follows():
    """The number is of other text than elsewhere; nothing is said where no answer was replaced."""
    one = setting(3, 0.01, 0.05, 3.0)
    assert not any("answers of the suite" in words for _, words in notes([one]))
    (told,) = [words for _, words in notes([one | {"replaced_prompts": 12}]) if "answers of the suite" in words]
    assert told.startswith("12 answers of the suite are not this verifier's output")
    assert "tau is over other text" in told
