"""The composition root: the stages in order, each skipped when its output is on disk, complete and intact."""

from speculators.pipeline.context import Context
from speculators.pipeline.run import RunOutcome, run_recipe
from speculators.runs.places import Places

__all__ = ["Context", "Places", "RunOutcome", "run_recipe"]
