"""`look`: what a run would train on, through the stage `prepare` itself, so that a later run finds it done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import torch

from speculators.data.conversations import parse
from speculators.data.encoded import Conversations, Encoded
from speculators.data.leakage import MAX_OVERLAP, HeldOut
from speculators.data.template import ChatTemplate
from speculators.errors import DataError, RecipeError
from speculators.events import Listen
from speculators.inspection.lint import Looked, lint
from speculators.inspection.on_policy import on_policy
from speculators.inspection.summary import count_rows, describe, show
from speculators.inspection.survey import RawRow, Survey, places_of, raw_rows, short_path, survey
from speculators.inspection.view import DataView, Leakage, OnPolicy, Shown, Vocabulary
from speculators.pipeline.arguments import draft_tokens
from speculators.pipeline.context import Context
from speculators.pipeline.prepare import held_out, prepared_conversations
from speculators.pipeline.regenerate import LeftOut, answers_file, is_whole, stream_prompts
from speculators.pipeline.setup import make_context
from speculators.recipe.input_sections import DataSource
from speculators.recipe.plan import make_plan
from speculators.recipe.schema import Recipe
from speculators.registry import near_miss
from speculators.runs.places import Places
from speculators.runs.stages import is_prepared
from speculators.training.world import World
from speculators.verifier.hub import fetch_tokenizer
from speculators.verifier.sources import fetch_facts, obtain
from speculators.verifier.tokens import load_tokenizer

ANSWER = {"role": "assistant", "content": "-"}


@attrs.frozen(kw_only=True)
class Wish:
    """What a person wants to see.

    Attributes:
        show: the first so many conversations.
        ids: these conversations instead.
        sample: so many conversations for the on-policy measure; 0 needs no weights of the verifier.
    """

    show: int = 1
    ids: tuple[str, ...] = ()
    sample: int = 8


def look(recipe: Recipe, wish: Wish, *, places: Places, listen: Listen) -> DataView:
    """Prepares the data, unless it is prepared, and looks at it; answers that are not generated yet are left so.

    Raises:
        RecipeError: an id is not there.
        SpeculatorsError: a source cannot be read, the tokenizer has no chat template, the verifier cannot be had.
    """
    context = _context(recipe, places, listen)
    trust = recipe.verifier.trust_remote_code
    template = ChatTemplate.of(load_tokenizer(context.folder, trust_remote_code=trust))
    waiting = _waits(context)
    found = survey(_raw(context, waiting), (held := held_out(recipe)), progress=context.tell)
    prepared, refused = (None, "") if waiting else _prepared(context, found)
    shown = _shown(context, wish, prepared, template) if prepared else _prompts(context, wish, template, waiting)
    vocabulary = _vocabulary(context, prepared, template) if prepared else None
    policy = _policy(context, prepared, wish.sample) if prepared and wish.sample else None
    rows = count_rows(prepared) if prepared else None
    return _view(
        Looked(
            survey=found,
            leakage=_leakage(found, held),
            rows=rows,
            vocabulary=vocabulary,
            on_policy=policy,
            waiting=found.usable if waiting else None,
            refused=refused,
            examples=_examples(context, prepared) if prepared else {},
            marked=template.has_markers,
            thinks=template.thinks_by_default(),
            thinking_share=found.counts[Survey.THINKING] / max(found.usable, 1),
            takes={source.path: source.take for source in recipe.data.sources if source.take is not None},
        ),
        shown,
        recipe.name,
    )


def _view(looked: Looked, shown: tuple[Shown, ...], name: str) -> DataView:
    return DataView(
        recipe=name,
        sources={short_path(path): count for path, count in looked.survey.rows.items()},
        waiting=looked.waiting,
        rows=looked.rows,
        vocabulary=looked.vocabulary,
        leakage=looked.leakage,
        on_policy=looked.on_policy,
        marked=looked.marked,
        thinks=looked.thinks,
        thinking_share=looked.thinking_share,
        findings=lint(looked),
        shown=shown,
    )


def _context(recipe: Recipe, places: Places, listen: Listen) -> Context:
    """Returns the context of a run; of a hub's model only the tokenizer is fetched, gigabytes of weights are not."""
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    section = recipe.verifier
    if section.kind != "hub":
        return make_context(recipe, places, world, listen)
    plan = make_plan(recipe, fetch_facts(section))
    folder = fetch_tokenizer(section.model, section.revision, trust_remote_code=section.trust_remote_code)
    return Context(recipe=recipe, plan=plan, folder=folder, places=places, world=world, listen=listen)


def _waits(context: Context) -> bool:
    """Returns whether answers have still to be generated: an hour's work that nobody asked for by looking."""
    regenerate = context.recipe.data.regenerate is not None
    return regenerate and not (is_whole(answers_file(context)) or is_prepared(context.plan, context.places))


def _raw(context: Context, waiting: bool) -> Iterator[RawRow]:
    sources: Sequence[DataSource] = context.recipe.data.sources
    if context.recipe.data.regenerate is None:
        yield from raw_rows(sources, Path())
    elif not waiting and is_whole(file := answers_file(context)):
        yield from raw_rows([DataSource(path=str(file))], Path())
    else:
        for source in sources:
            for place, row in stream_prompts(source, LeftOut()):
                value = {**row, "messages": [*row["messages"], ANSWER]}
                here = short_path(place)
                yield RawRow(here, source.path, value, parse(value, here))


def _prepared(context: Context, found: Survey) -> tuple[Conversations | None, str]:
    """Returns the stage's conversations; or None, and why it refuses the data where no other finding tells so."""
    if found.counts[Survey.SAME] or not found.usable:
        return None, "" if found.usable else "no row of the sources can be used"
    try:
        return prepared_conversations(context), ""
    except DataError as error:
        return None, str(error)


def _shown(context: Context, wish: Wish, prepared: Conversations, template: ChatTemplate) -> tuple[Shown, ...]:
    names = prepared.ids()
    indices = [_index(name, names) for name in wish.ids] or list(range(min(wish.show, len(names))))
    limit = context.recipe.data.max_tokens
    return tuple(show(names[index], prepared.row(index), template, max_tokens=limit) for index in indices)


def _index(name: str, names: Sequence[str]) -> int:
    if name not in names:
        hint = near_miss(name, list(names)) or "it may be one that is left out: see the counts"
        raise RecipeError(f"--id: no prepared conversation is called {name!r} ({hint})")
    return names.index(name)


def _prompts(context: Context, wish: Wish, template: ChatTemplate, waiting: bool) -> tuple[Shown, ...]:
    """Returns prompts as the verifier will read them: nothing of them is supervised."""
    if not waiting:
        return ()
    rows = (row.conversation for row in _raw(context, waiting))
    prompts = {row.id: row.messages[:-1] for row in rows if not isinstance(row, str)}
    names = list(prompts)
    chosen = [names[_index(name, names)] for name in wish.ids] or names[: wish.show]
    shown = []
    for name in chosen:
        ids = np.array(template.prompt_ids(prompts[name]), np.int32)
        encoded = Encoded(ids, np.zeros(len(ids), np.bool_))
        shown.append(show(name, encoded, template, max_tokens=context.recipe.data.max_tokens))
    return tuple(shown)


def _vocabulary(context: Context, prepared: Conversations, template: ChatTemplate) -> Vocabulary:
    ids, ends = draft_tokens(context, prepared)
    ids = np.arange(context.plan.facts.vocab_size) if ids is None else ids
    return describe(prepared, ids, ends, template=template, depths=context.recipe.benchmark.num_speculative_tokens)


def _policy(context: Context, prepared: Conversations, sample: int) -> OnPolicy:
    # Of a hub's model the weights are not there yet; they come into the same folder.
    obtain(context.recipe.verifier, cache=context.places.cache, progress=context.tell)
    return on_policy(context, prepared, sample)


def _leakage(found: Survey, held: Sequence[HeldOut]) -> Leakage:
    return Leakage(
        held_out=dict(Counter(one.suite for one in held)),
        same=found.counts[Survey.SAME],
        near=found.counts[Survey.NEAR],
        largest=found.largest,
        limit=MAX_OVERLAP,
    )


def _examples(context: Context, prepared: Conversations) -> dict[str, str]:
    """Returns, for each reason of the template not to take a row, the first such row with its place."""
    first = prepared.skipped_examples
    places = places_of(_raw(context, waiting=False), first.values()) if first else {}
    return {reason: f"{places[name]} {name}" if name in places else name for reason, name in first.items()}
