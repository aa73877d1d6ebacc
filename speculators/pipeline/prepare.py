"""The stage `prepare`: conversations as tokens."""

from __future__ import annotations

from pathlib import Path

from speculators.bench.suites import load_suite
from speculators.data.conversations import prompt_key, told
from speculators.data.encoded import Conversations
from speculators.data.leakage import HeldOut
from speculators.data.prepare import losses, prepare
from speculators.events import WarningEvent
from speculators.pipeline.context import Context
from speculators.pipeline.regenerate import regenerated
from speculators.recipe.schema import Recipe
from speculators.runs.stages import is_prepared
from speculators.verifier.tokens import load_tokenizer


def prepared_conversations(context: Context) -> Conversations:
    """Returns the prepared conversations: stage `prepare`."""
    folder = context.places.prepared(context.plan)
    with context.alone(folder, "prepare"):
        return _prepared(context, folder)


def _prepared(context: Context, folder: Path) -> Conversations:
    plan, data = context.plan, context.recipe.data
    key = plan.stage("prepare").fingerprint
    # Rank 0 decides: another that looked when the stage was already done would miss its barrier.
    if context.world.broadcast(context.world.is_main and is_prepared(plan, context.places, verify=True)):
        found = Conversations.open(folder, key=key)
        context.skip("prepare", f"{len(found)} conversations are in {folder}")
        context.note("prepare", {name: held["sha256"] for name, held in found.manifest["files"].items()})
        return found
    with context.stage("prepare") as words:
        if context.world.is_main:
            prepare(
                regenerated(context) if data.regenerate else data,
                folder=folder,
                tokenizer=load_tokenizer(context.folder, trust_remote_code=context.recipe.verifier.trust_remote_code),
                vocab_size=plan.facts.vocab_size,
                base=Path(),
                held_out={prompt_key(held.prompt) for held in held_out(context.recipe)},
                key=key,
                progress=context.tell,
            )
        context.world.barrier()
        made = Conversations.open(folder, key=key)
        words.append(f"{len(made)} conversations, {made.lengths.sum():,} tokens, {made.supervised.sum():,} supervised")
        if made.skipped:
            words.append(f"left out: {told(made.skipped)}")
        if made.truncated:
            words.append(f"{made.truncated} cut at {data.max_tokens} tokens")
    for lost in losses(made):
        context.tell(WarningEvent(message=lost))
    context.note("prepare", {name: held["sha256"] for name, held in made.manifest["files"].items()})
    return made


def held_out(recipe: Recipe) -> list[HeldOut]:
    """Returns the prompts of the recipe's suites, by their first user turn: none of them may be trained on."""
    return [
        HeldOut(suite.name, prompt.id, next(message.content for message in prompt.messages if message.role == "user"))
        for suite in recipe.benchmark.suites
        for prompt in load_suite(suite)
    ]
