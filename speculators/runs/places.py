"""Where everything lies: the layout of the cache and of a run folder."""

from __future__ import annotations

from pathlib import Path

import attrs

from speculators.files.disk import cache_folder
from speculators.recipe.plan import Plan


@attrs.frozen(kw_only=True)
class Places:
    """Where a run keeps what it makes.

    Attributes:
        runs: holds one folder a run.
        cache: holds what runs share: prepared conversations, hidden states.
        verifiers: cache of converted verifiers; the same unless it is told, for they are input and not output.
    """

    runs: Path = Path("runs")
    cache: Path = attrs.field(factory=cache_folder)
    verifiers: Path = attrs.field()

    @verifiers.default
    def _beside(self) -> Path:
        return self.cache

    def prepared(self, plan: Plan) -> Path:
        """Returns the folder of the prepared conversations."""
        return self.cache / "conversations" / plan.stage("prepare").fingerprint[:16]

    def states(self, plan: Plan) -> Path:
        """Returns the folder of the cached hidden states."""
        return self.cache / "states" / plan.stage("capture").fingerprint[:16]

    def run(self, plan: Plan) -> Path:
        """Returns the run folder."""
        return self.runs / plan.run_name
