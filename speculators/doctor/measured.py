"""The checks that replay the draft on the verifier's answers, and what is left of them where it cannot be replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from speculators.doctor.acceptance import check_acceptance
from speculators.doctor.alignment import check_alignment
from speculators.doctor.answers import Answers
from speculators.doctor.check import WRONG, Check, Family
from speculators.doctor.config import check_config
from speculators.doctor.effort import LEFT_OUT, Effort
from speculators.doctor.frozen import check_frozen
from speculators.doctor.guard import MEND, RAISED, guarded, skip, stage
from speculators.doctor.length import check_length
from speculators.doctor.paired import TrialComparison, compare
from speculators.doctor.parity import check_parity
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.doctor.stored import check_memorised
from speculators.doctor.trials import DraftTrials
from speculators.doctor.untrained import check_untrained
from speculators.doctor.vocabulary import check_vocabulary
from speculators.errors import SpeculatorsError
from speculators.events import Listen
from speculators.runs.places import Places


def check_files(speculator: ExaminedSpeculator, problem: str) -> list[Check]:
    """Runs the checks that need no replay, and reports the others as not checked."""
    checks = guarded("config", lambda: check_config(speculator, lambda _: None))
    if speculator.model is not None:
        checks += guarded("loads", lambda: check_vocabulary(speculator))
        checks += guarded("loads", lambda: check_frozen(speculator, accepts=None))
        checks += guarded("loads", lambda: check_untrained(speculator, accepts=None))
    return checks + skip(("alignment", "parity", "length"), problem)


def check_answers(
    speculator: ExaminedSpeculator, answers: Answers, effort: Effort, places: Places, listen: Listen
) -> list[Check]:
    """Runs the checks that replay the draft, and those that depend on its acceptance."""
    trials = DraftTrials(speculator, answers)
    try:
        with stage(listen, "alignment"):
            acceptance = check_acceptance(trials)
            checks = [acceptance, *guarded("alignment", lambda: check_alignment(trials, effort, listen))]
    except SpeculatorsError as error:
        return check_files(speculator, str(error))
    # A plug-in's code may raise anything.
    except Exception as error:
        evidence = f"{RAISED} {type(error).__name__}: {error}"
        return [
            Family("alignment").wrong("acceptance", evidence, MEND),
            *check_files(speculator, "the draft cannot be replayed"),
        ]
    accepts = acceptance.result != WRONG
    checks += guarded("loads", lambda: check_vocabulary(speculator))
    checks += guarded("loads", lambda: check_frozen(speculator, accepts=accepts))
    checks += guarded("loads", lambda: check_untrained(speculator, accepts=accepts))
    checks += guarded("config", lambda: check_config(speculator, _attempts(trials)))
    with stage(listen, "parity"):
        checks += guarded("parity", lambda: check_parity(trials, thorough=effort.thorough))
    if not effort.thorough:
        return checks + skip(("length",), LEFT_OUT)
    with stage(listen, "length"):
        checks += guarded("length", lambda: check_length(trials))
    return checks + guarded("data", lambda: [check_memorised(trials, places)])


def _attempts(trials: DraftTrials) -> Callable[[Mapping[str, Any]], TrialComparison | None]:
    """Makes the function that replays other values of the decoder's config with the same weights."""

    def attempt(changes: Mapping[str, Any]) -> TrialComparison | None:
        try:
            model = trials.speculator.with_config(transformer_layer_config={**trials.speculator.decoder, **changes})
        # The weights do not fit, or the algorithm rejects the values.
        except (SpeculatorsError, RuntimeError, ValueError, KeyError, TypeError):
            return None
        return compare(trials.configured, trials.attempt_with(model))

    return attempt
