"""The stage `prepare`: conversations become tokens with a loss mask."""

from __future__ import annotations

from pathlib import Path

from speculators.data.conversations import prompt_key
from speculators.data.encoded import Conversations
from speculators.data.leakage import HeldOut
from speculators.data.prepare import loss_warnings, prepare
from speculators.events import Pieces, PreparedFacts, Progress, WarningEvent
from speculators.pipeline.context import Context
from speculators.pipeline.regenerate import other_author, regenerated
from speculators.runs.stages import is_prepared
from speculators.verifier.tokens import load_tokenizer

# How much longer the verifier takes to answer prompts than the answers take to be tokenized, at least.
ANSWERING = 19


def prepared_conversations(context: Context) -> Conversations:
    """Runs the stage, unless it is done; every process calls this."""
    folder = context.places.prepared(context.plan)
    with context.alone(folder, "prepare"):
        prepared = _prepare(context, folder)
    context.note_files("prepare", {name: entry["sha256"] for name, entry in prepared.manifest["files"].items()})
    return prepared


def _prepare(context: Context, folder: Path) -> Conversations:
    plan, data = context.plan, context.recipe.data
    key = plan.stage("prepare").fingerprint
    # Rank 0 decides for all: a process that looked after rank 0 was done would skip the barrier below.
    if context.world.broadcast(context.world.is_main and is_prepared(plan, context.places, verify=True)):
        existing = Conversations.open(folder, key=key)
        context.skip("prepare", f"{len(existing)} conversations are in {folder}")
        return existing
    with context.stage("prepare") as result:
        if context.world.is_main:
            _warn_of_other_authors(context)
        _write(context, folder)
        context.world.barrier()
        prepared = Conversations.open(folder, key=key)
        result.facts = PreparedFacts(
            conversations=prepared.conversations,
            tokens=int(prepared.lengths.sum()),
            supervised=int(prepared.supervised.sum()),
            skipped=dict(prepared.skipped),
            truncated=prepared.truncated,
            max_tokens=data.max_tokens,
        )
    for loss in loss_warnings(prepared):
        context.emit(WarningEvent(message=loss))
    return prepared


def _write(context: Context, folder: Path) -> None:
    """Writes the conversations on rank 0, after the verifier has answered them where the recipe says so."""
    stage, data = context.plan.stage("prepare"), context.recipe.data
    planned = stage.inputs["sources"]
    progress: Progress = context.emit
    if data.regenerate is not None:
        pieces = Pieces(stage="prepare", pieces=ANSWERING + 1, listen=context.emit)
        # Their file is not in the plan: it has its hash beside it.
        data, planned = regenerated(context, pieces.piece(weight=ANSWERING)), ()
        progress = pieces.piece()
    if not context.world.is_main:
        return
    prepare(
        data,
        folder=folder,
        tokenizer=load_tokenizer(context.folder, context.recipe.verifier),
        vocab_size=context.plan.facts.vocab_size,
        base=Path(),
        held_out={prompt_key(row.prompt) for row in held_out(context)},
        planned=planned,
        key=stage.fingerprint,
        progress=progress,
    )


def _warn_of_other_authors(context: Context) -> None:
    """Warns of answers that another verifier wrote: with the same tokenizer, nothing else would tell."""
    for source in context.recipe.data.sources if context.recipe.data.regenerate is None else ():
        if author := other_author(Path(source.path), context.folder):
            message = f"{source.path}: {author} wrote these answers, whose weights are not this verifier's"
            context.emit(WarningEvent(message=f"{message}: the draft learns what another model writes"))


def held_out(context: Context) -> list[HeldOut]:
    """Lists the prompts of the recipe's suites by their first user turn: none of them may be trained on."""
    return [
        HeldOut(suite.name, prompt.id, next(message.content for message in prompt.messages if message.role == "user"))
        for suite in context.recipe.benchmark.suites
        for prompt in context.prompts(suite)
    ]
