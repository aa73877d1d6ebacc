"""What the run of a speculator knows about it: its benchmark, its recipe, its lock."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.recipe.lock import Lock


@attrs.frozen(kw_only=True)
class Background:
    """Where a speculator comes from, as far as files beside it tell.

    Attributes:
        run: the run folder's name; None for a speculator outside of one.
        settings: of its benchmarks, as JSON values.
        recipe: its text.
        lock: None where there is none that can be read.
        unread: files of the run that are left out, in words.
    """

    run: str | None = None
    settings: tuple[dict[str, Any], ...] = ()
    recipe: str | None = None
    lock: Lock | None = None
    unread: tuple[str, ...] = ()
