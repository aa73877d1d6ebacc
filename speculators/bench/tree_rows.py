"""The rows of drafted trees in a benchmark, and what a benchmark with trees needs."""

from __future__ import annotations

from collections.abc import Mapping

from speculators.bench.context import Benchable, BenchContext
from speculators.bench.replay import Replayed
from speculators.bench.result import Live, TreeRow, summarize, sums_by_prompt, tree_definition
from speculators.decoding.target import tree_fault
from speculators.drafter import DraftsTrees
from speculators.errors import Problem, RecipeError
from speculators.recipe.schema import BenchmarkSection
from speculators.recipe.tree import StaticTree
from speculators.verifier.engine import Engine
from speculators.verifier.responding import RespondingVerifier


def check_trees(model: Benchable, engine: RespondingVerifier, section: BenchmarkSection, *, live: bool) -> None:
    """Checks that speculator and verifier can do what the trees of `section` need, before anything is measured.

    Raises:
        RecipeError: names every fault.
    """
    faults = []
    if live and not isinstance(model.draft(), DraftsTrees):
        missing = "the algorithm's drafter has no begin_tree(), which trees grow from (speculators/drafter.py)"
        faults.append(Problem("benchmark.trees", missing, "measure it without trees"))
    if live and isinstance(engine, Engine) and (fault := tree_fault(engine.model)):
        faults.append(Problem("benchmark.trees", fault, "measure it without trees"))
    drafted = len(model.draft_to_target)
    faults += [
        Problem("benchmark.trees", f'"{shape.name}" has more siblings than the draft has tokens ({drafted})')
        for shape in section.tree_shapes
        if isinstance(shape, StaticTree) and shape.width > drafted
    ]
    if faults:
        raise RecipeError(faults)


def tree_rows(
    context: BenchContext, replayed: Mapping[str, Replayed], lives: Mapping[str, Live]
) -> tuple[TreeRow, ...]:
    """Makes the rows of all trees, in the section's order.

    Args:
        replayed: of the whole suite, by name, where replay knows the trees.
        lives: by name; empty without live decoding.
    """
    rows = []
    for shape in context.section.tree_shapes:
        depth = shape.depth_within(context.k_max)
        exact, by_prompt = None, {}
        if (known := replayed.get(shape.name)) is not None:
            counts = known.counts(depth)
            exact, by_prompt = summarize(counts, known.ids, seed=context.seed), sums_by_prompt(counts, known.ids)
        rows.append(
            TreeRow(
                name=shape.name,
                nodes=shape.nodes,
                depth=depth,
                definition=tree_definition(shape, depth),
                exact=exact,
                by_prompt=by_prompt,
                live=lives.get(shape.name),
            )
        )
    return tuple(rows)
