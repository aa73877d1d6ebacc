"""Prepares a recipe's data through the stage `prepare`, so that a later run finds it done, and describes it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np

from speculators.data.encoded import Conversations, Encoded
from speculators.data.leakage import MAX_OVERLAP
from speculators.data.template import ChatTemplate
from speculators.errors import DataError, RecipeError
from speculators.events import Listen
from speculators.inspection import kinds
from speculators.inspection.lint import lint
from speculators.inspection.mapped import mapped_rows
from speculators.inspection.on_policy import measure_on_policy
from speculators.inspection.summary import count_rows, describe_vocabulary, render_conversation
from speculators.inspection.survey import RawRow, Survey, raw_rows, rows_of, short_path, survey_rows
from speculators.inspection.view import DataView, Leakage, RenderedConversation, Vocabulary
from speculators.pipeline.arguments import DraftVocabulary
from speculators.pipeline.context import Context
from speculators.pipeline.dialogues import Dialogue, LeftOut, stream_dialogues
from speculators.pipeline.prepare import held_out, prepared_conversations
from speculators.pipeline.regenerate import answers_file, is_whole
from speculators.pipeline.setup import make_context
from speculators.recipe.input_sections import DataSource
from speculators.recipe.plan import make_plan
from speculators.recipe.schema import Recipe
from speculators.registry import near_miss
from speculators.runs.places import Places
from speculators.runs.stages import is_prepared
from speculators.training.world import World, local_device
from speculators.verifier.hub import fetch_tokenizer
from speculators.verifier.sources import fetch_facts, obtain
from speculators.verifier.tokens import load_tokenizer

# The end of a row's name where its conversation has several.
ROW_NUMBER = re.compile(r"#\d+$")


def inspect_data(
    recipe: Recipe, *, show: int = 1, ids: Sequence[str] = (), sample: int = 8, places: Places, listen: Listen
) -> DataView:
    """Prepares the data, unless that was done before, and describes it. Never generates missing answers.

    Args:
        show: how many conversations to render, from the first on.
        ids: render these conversations instead.
        sample: how many conversations to measure on-policy; 0 needs no weights of the verifier.

    Raises:
        RecipeError: no conversation has one of the ids.
        SpeculatorsError: a source cannot be read, the tokenizer has no chat template, the verifier cannot be obtained.
    """
    context = _context(recipe, places, listen)
    template = ChatTemplate.of(load_tokenizer(context.folder, recipe.verifier))
    waiting = _awaits_answers(context)
    survey = survey_rows(_raw_rows(context, waiting), held_out(context), progress=context.emit)
    prepared, refusal = (None, "") if waiting else _prepare(context, survey)
    if prepared:
        shown = _render(context, prepared, template, show=show, ids=ids)
    else:
        shown = _render_prompts(context, template, show=show, ids=ids) if waiting else ()
    vocabulary = _vocabulary(context, prepared, template) if prepared else None
    on_policy = None
    if prepared and sample:
        # So far only the tokenizer of a hub's model was fetched; its weights go into the same folder.
        obtain(recipe.verifier, cache=places.cache, progress=context.emit)
        on_policy = measure_on_policy(context, prepared, sample)
    view = DataView(
        recipe=recipe.name,
        sources={short_path(path): count for path, count in survey.rows.items()},
        waiting=survey.usable if waiting else None,
        rows=count_rows(prepared) if prepared else None,
        vocabulary=vocabulary,
        leakage=Leakage(
            suites=survey.suites,
            same=survey.counts[Survey.SAME],
            near=survey.counts[Survey.NEAR],
            limit=MAX_OVERLAP,
        ),
        on_policy=on_policy,
        marked=template.has_markers,
        thinks=template.thinks_by_default(),
        thinking_share=survey.counts[kinds.REASONING] / max(survey.usable, 1),
        kinds={kind: survey.counts[kind] for kind in kinds.ALL if survey.counts[kind]},
        dropped=tuple(kind for kind in kinds.dropped_kinds(template) if survey.counts[kind]),
        answers=str(answers_file(context)) if recipe.data.regenerate else "",
        shown=shown,
    )
    takes = {source.path: source.take for source in recipe.data.sources if source.take is not None}
    examples = _skipped_examples(context, prepared) if prepared else {}
    findings = lint(view, survey, refusal=refusal, skipped_examples=examples, takes=takes)
    return attrs.evolve(view, findings=(*findings, *mapped_rows(recipe.data.sources, survey.rows)))


def _context(recipe: Recipe, places: Places, listen: Listen) -> Context:
    """Makes a run's context, but fetches only the tokenizer of a hub's model, not its gigabytes of weights."""
    world = World(device=local_device())
    section = recipe.verifier
    if section.kind != "hub":
        return make_context(recipe, places, world, listen)
    plan = make_plan(recipe, fetch_facts(section))
    folder = fetch_tokenizer(section.model, section.revision, trust_remote_code=section.trust_remote_code)
    return Context(recipe=recipe, plan=plan, folder=folder, places=places, world=world, listen=listen)


def _awaits_answers(context: Context) -> bool:
    """Whether answers have yet to be generated: an hour's work that nobody asked `spec data` to do."""
    regenerate = context.recipe.data.regenerate is not None
    return regenerate and not (is_whole(answers_file(context)) or is_prepared(context.plan, context.places))


def _raw_rows(context: Context, waiting: bool) -> Iterator[RawRow]:
    sources: Sequence[DataSource] = context.recipe.data.sources
    if context.recipe.data.regenerate is None:
        yield from raw_rows(sources, Path())
    elif not waiting and is_whole(file := answers_file(context)):
        yield from raw_rows([DataSource(path=str(file))], Path())
    else:
        for source, dialogue in _dialogues(sources):
            yield RawRow(short_path(dialogue.place), source.path, dialogue.row, dialogue.conversation)


def _dialogues(sources: Sequence[DataSource]) -> Iterator[tuple[DataSource, Dialogue]]:
    for source in sources:
        yield from ((source, dialogue) for dialogue in stream_dialogues(source, LeftOut()))


def _prepare(context: Context, survey: Survey) -> tuple[Conversations | None, str]:
    """Runs the stage; if the data is unusable, returns None and, where no finding gives the reason, the refusal."""
    if survey.counts[Survey.SAME] or not survey.usable:
        return None, "" if survey.usable else "no row of the sources can be used"
    try:
        return prepared_conversations(context), ""
    except DataError as error:
        return None, str(error)


def _render(
    context: Context, prepared: Conversations, template: ChatTemplate, *, show: int, ids: Sequence[str]
) -> tuple[RenderedConversation, ...]:
    names = prepared.ids()
    indices = [index for name in ids for index in _rows(name, names)] or list(range(min(show, len(names))))
    limit = context.recipe.data.max_tokens
    origins = {index: ROW_NUMBER.sub("", names[index]) for index in indices}
    rows = rows_of(_raw_rows(context, waiting=False), [*origins.values(), *(names[i] for i in indices)])
    made_of = {name: conversation for name, (_, conversation) in rows.items()}
    return tuple(
        render_conversation(
            names[index],
            prepared.row(index),
            template,
            max_tokens=limit,
            conversation=made_of.get(names[index], made_of.get(origins[index])),
        )
        for index in indices
    )


def _render_prompts(
    context: Context, template: ChatTemplate, *, show: int, ids: Sequence[str]
) -> tuple[RenderedConversation, ...]:
    """Renders first prompts as the verifier will read them; nothing in them is supervised."""
    prompts = {short_path(each.conversation.id): each for _, each in _dialogues(context.recipe.data.sources)}
    names = list(prompts)
    rendered = []
    for name in [names[_index(name, names)] for name in ids] or names[:show]:
        shown = prompts[name].conversation
        ids_of = template.prompt_ids(prompts[name].messages_before(0), tools=shown.tools, documents=shown.documents)
        tokens = np.array(ids_of, np.int32)
        encoded = Encoded(tokens, np.zeros(len(tokens), np.bool_))
        rendered.append(render_conversation(name, encoded, template, max_tokens=context.recipe.data.max_tokens))
    return tuple(rendered)


def _rows(name: str, names: Sequence[str]) -> list[int]:
    """Finds the rows of a conversation, or one of them by its own name."""
    several = [index for index, row in enumerate(names) if re.fullmatch(rf"{re.escape(name)}#\d+", row)]
    return several if several and name not in names else [_index(name, names)]


def _index(name: str, names: Sequence[str]) -> int:
    if name not in names:
        hint = near_miss(name, list(names)) or "it may have been left out: see the counts"
        raise RecipeError(f"--id: no prepared conversation is called {name!r} ({hint})")
    return names.index(name)


def _vocabulary(context: Context, prepared: Conversations, template: ChatTemplate) -> Vocabulary:
    draft = DraftVocabulary.of(context, prepared)
    ids, ends = draft.ids, draft.ends
    ids = np.arange(context.plan.facts.vocab_size) if ids is None else ids
    depths = context.recipe.benchmark.num_speculative_tokens
    return describe_vocabulary(prepared, ids, ends, template=template, depths=depths)


def _skipped_examples(context: Context, prepared: Conversations) -> dict[str, str]:
    """Locates, for each reason of the template to refuse a row, the first such row."""
    examples = prepared.skipped_examples
    rows = rows_of(_raw_rows(context, waiting=False), examples.values()) if examples else {}
    return {reason: f"{rows[name][0]} {name}" if name in rows else name for reason, name in examples.items()}
