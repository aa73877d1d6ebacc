"""Runs groups of checks so that an error in one of them is a finding, and the others go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from speculators.doctor.check import Check, Family
from speculators.errors import SpeculatorsError
from speculators.events import Listen, StageEvent

RAISED, MEND = "the algorithm's code raised", "fix the algorithm's code, or the value of config.json that it names"


def guarded(family: str, checks: Callable[[], Iterable[Check]]) -> list[Check]:
    """Collects the checks of a family; an error that stops them becomes the last check."""
    collected: list[Check] = []
    try:
        for check in checks():
            collected.append(check)
    except (SpeculatorsError, OSError) as error:
        collected.append(Family(family).skipped("the rest", str(error)))
    # A plug-in's code may raise anything.
    except Exception as error:
        evidence = f"{RAISED} {type(error).__name__}: {error}"
        collected.append(Family(family).wrong("the rest", evidence, MEND))
    return collected


def skip(families: Sequence[str], why: str) -> list[Check]:
    """Reports whole families as not checked."""
    return [Family(family).skipped("all", why) for family in families]


@contextmanager
def stage(listen: Listen, name: str) -> Iterator[None]:
    """Reports start, end and duration of a group of checks."""
    began = time.monotonic()
    listen(StageEvent(stage=name, status="start"))
    yield
    listen(StageEvent(stage=name, status="done", seconds=time.monotonic() - began))
