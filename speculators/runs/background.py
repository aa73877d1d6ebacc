"""Where a speculator comes from: the benchmarks, recipe and lock of its run."""

from __future__ import annotations

from pathlib import Path

import attrs

from speculators.bench.result import Setting
from speculators.errors import LockError
from speculators.recipe.lock import Lock
from speculators.runs.benches import read_benches
from speculators.runs.places import RunFolder
from speculators.runs.tunings import RunTuning, read_tuning


@attrs.frozen(kw_only=True)
class Background:
    """Where a speculator comes from, as far as its run folder says.

    Attributes:
        run: the run folder's name; None for a speculator outside of one.
        settings: the newest numbers of its benchmarks.
        recipe: the text of its recipe; None where it is missing.
        lock: None where it is missing or unreadable.
        tuning: what `spec tune` chose.
        unread: why a file of the run was left out, one line for each.
    """

    run: str | None = None
    settings: tuple[Setting, ...] = ()
    recipe: str | None = None
    lock: Lock | None = None
    tuning: RunTuning = RunTuning()
    unread: tuple[str, ...] = ()


def background_of(speculator: Path) -> Background:
    """Reads the background of a speculator from the run folder around it; empty outside of a run."""
    run = RunFolder.around(speculator)
    if run is None or not run.plan.is_file():
        return Background()
    benches, tuning, text = read_benches(run.path), read_tuning(run.path), run.recipe
    lock, unread = None, [*benches.unread, *tuning.unread]
    try:
        lock = Lock.read(run.path)
    except LockError as error:
        unread.append(f"{error}: the lock is left out")
    return Background(
        run=run.name,
        settings=benches.settings,
        recipe=text.read_text(encoding="utf-8") if text.is_file() else None,
        lock=lock,
        tuning=tuning,
        unread=tuple(unread),
    )
