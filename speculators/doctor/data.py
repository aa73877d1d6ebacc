"""Checks the run's own data: stored tokens and loss mask, the template's rendering, and the findings of `spec data`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import attrs
import numpy as np

from speculators.data.encoded import Conversations, Encoded, row_names
from speculators.data.messages import Conversation
from speculators.data.template import ChatTemplate
from speculators.doctor.check import Check, Family
from speculators.doctor.speculator import ExaminedSpeculator, TrainingRun
from speculators.doctor.stored import conversations_of
from speculators.errors import ArtifactError, SpeculatorsError
from speculators.events import Listen, ignore
from speculators.facts import VerifierFacts
from speculators.inspection.inspect import inspect_data
from speculators.inspection.survey import raw_rows
from speculators.inspection.view import ERROR, WARNING, DataView
from speculators.pipeline.regenerate import is_whole
from speculators.recipe.input_sections import DataSection, DataSource
from speculators.recipe.plan import make_plan
from speculators.recipe.relocate import relocate
from speculators.recipe.schema import Recipe
from speculators.runs.places import Places, RunFolder
from speculators.runs.stages import made
from speculators.verifier.tokens import load_tokenizer

DATA = Family("data")
# Number of conversations to test for being on-policy, and number to render again.
SAMPLE, RENDERED = 8, 16
# Share of all tokens: prompts and turn markers make up at least a twentieth of a chat.
MOST_SUPERVISED = 0.95
PROMISED = ("as prepared", "loss mask", "rendering", "lint", "on-policy")


def check_data(speculator: ExaminedSpeculator, places: Places, listen: Listen = ignore) -> Iterator[Check]:
    """Yields the checks of the run's data; what has been deleted since is reported as not checked."""
    origin = speculator.origin
    if origin is None:
        for name in PROMISED:
            yield DATA.skipped(name, speculator.origin_problem)
        return
    recipe, lost = relocate(origin.recipe, origin.lock, origin.folder)
    if lost:
        for name in PROMISED:
            yield DATA.skipped(name, f"the run's data no longer exists: {lost[0]}")
        return
    plan = make_plan(recipe, VerifierFacts(origin.lock.verifier.config), world_size=1)
    key = origin.lock.fingerprints["prepare"]
    try:
        # By the lock's fingerprint, not the plan's: they differ if the verifier has changed since.
        prepared = conversations_of(key, places)
    except ArtifactError as error:
        for name in PROMISED:
            yield DATA.skipped(name, f"the prepared conversations are gone: {str(error).splitlines()[0]}")
        return
    intact = _stored(origin, prepared)
    yield intact
    yield check_mask(prepared, plain_text=any(each.map and each.map.text for each in recipe.data.sources))
    yield _rendering(speculator, _sources(recipe, places, key), prepared, recipe.data)
    if intact.result == "wrong" or plan.stage("prepare").fingerprint != key:
        why = "the stored data, or the verifier, has changed since training"
        yield DATA.skipped("lint", why)
        yield DATA.skipped("on-policy", why)
        return
    yield from _inspected(recipe, places, listen)


def _stored(origin: TrainingRun, prepared: Conversations) -> Check:
    """Compares the stored conversations with the hashes that the run recorded."""
    run = RunFolder(origin.folder)
    name, noted = "as prepared", made(run)["prepare"].files if "prepare" in made(run) else {}
    if not noted:
        return DATA.skipped(name, f"{origin.folder} has no {run.made.name}, so there is nothing to compare with")
    try:
        Conversations.open(prepared.folder, verify=True)
        now = {file: record["sha256"] for file, record in prepared.manifest["files"].items()}
        changed = sorted(file for file in {*noted, *now} if noted.get(file) != now.get(file))
        evidence = f"{', '.join(changed)}: not what the run was trained on (sha256)"
    except ArtifactError as error:
        changed, evidence = ["?"], str(error).splitlines()[0]
    if changed:
        return DATA.wrong(name, evidence, "run its recipe again with spec run to prepare the data")
    return DATA.ok(name, f"{len(prepared):,} conversations in the files that the run recorded (sha256)")


def check_mask(prepared: Conversations, *, plain_text: bool) -> Check:
    """Checks how many tokens are supervised: none, all, or just the answers; of plain text, all should be."""
    name = "loss mask"
    masks = [prepared.row(index).loss_mask for index in range(len(prepared))]
    shares = np.array([mask.mean() for mask in masks])
    total, tokens = sum(int(mask.sum()) for mask in masks), int(prepared.lengths.sum())
    share = total / max(1, tokens)
    none, full = int((shares == 0).sum()), int((shares >= MOST_SUPERVISED).sum())
    figures = f"{total:,} of {tokens:,} tokens are supervised ({share:.1%}), "
    figures += f"{shares.min():.0%} to {shares.max():.0%} per conversation"
    if total == 0:
        evidence = f"nothing is supervised (all-zero mask), so training ran at zero loss; {figures}"
        todo = "look at the mask (spec data RECIPE --show 3), fix the template or the data, and train again"
        return DATA.wrong(name, evidence, todo)
    if share > MOST_SUPERVISED and not plain_text:
        evidence = f"the prompt is supervised, too (all-ones mask): {figures}"
        return DATA.wrong(name, evidence, "fix or remove the template's {% generation %} markers, and train again")
    if none or (full and not plain_text):
        evidence = f"{none} conversations have no supervised token, {full} are supervised almost entirely: {figures}"
        return DATA.warning(name, evidence, "look at them (spec data RECIPE --id ID)")
    return DATA.ok(name, figures)


def _rendering(
    speculator: ExaminedSpeculator, sources: Iterable[Conversation], prepared: Conversations, data: DataSection
) -> Check:
    """Renders some conversations again and compares tokens and mask with the stored ones."""
    name = "rendering"
    template = ChatTemplate.of(load_tokenizer(speculator.verifier, speculator.section))
    rows = {one: index for index, one in enumerate(prepared.ids())}
    conversations = (each for each in sources if any(row_names(each.id, count)[0] in rows for count in (1, 2)))
    mismatch, seen = "", 0
    for conversation in islice(conversations, RENDERED):
        seen += 1
        now = template.encode(conversation.training_on(data.train_on), data.max_tokens)
        if isinstance(now, str):
            mismatch = mismatch or f"{conversation.id}: {now}"
            continue
        for row, rendered in zip(row_names(conversation.id, len(now)), now, strict=True):
            stored = prepared.row(rows[row]) if row in rows else None
            difference = "is not stored" if stored is None else _difference(stored, rendered)
            mismatch = mismatch or (f"{row}: {difference}" if difference else "")
    if not seen:
        return DATA.skipped(name, "the sources no longer contain the stored conversations")
    if mismatch:
        evidence = f"the verifier's tokenizer and chat template do not reproduce the training data: {mismatch}"
        return DATA.wrong(name, evidence, "restore the tokenizer and template of training, or train again")
    return DATA.ok(name, f"{seen} conversations rendered again give the same tokens and mask")


def _difference(stored: Encoded, now: Encoded) -> str:
    """Describes how a row rendered again differs from the stored one; "" if it does not."""
    if not np.array_equal(stored.input_ids, now.input_ids):
        return f"other tokens ({len(stored.input_ids)} stored, {len(now.input_ids)} now)"
    if np.array_equal(stored.loss_mask, now.loss_mask):
        return ""
    at = int((stored.loss_mask != now.loss_mask).nonzero()[0][0])
    shifted = any(np.array_equal(stored.loss_mask[1:], np.roll(now.loss_mask, step)[1:]) for step in (-1, 1))
    return f"the mask {'is shifted by one' if shifted else 'differs'} from token {at} on"


def _sources(recipe: Recipe, places: Places, key: str) -> Iterator[Conversation]:
    sources = recipe.data.sources
    if recipe.data.regenerate is not None:
        file = places.answers(key)
        sources = (DataSource(path=str(file)),) if is_whole(file) else ()
    for row in raw_rows(sources, Path()):
        if not isinstance(row.conversation, str):
            yield row.conversation


def _inspected(recipe: Recipe, places: Places, listen: Listen) -> Iterator[Check]:
    """Yields the findings of `spec data`."""
    try:
        view = inspect_data(recipe, show=0, sample=SAMPLE, places=places, listen=listen)
    except SpeculatorsError as error:
        yield DATA.skipped("lint", str(error))
        return
    yield _lint(view)
    yield _on_policy(view)


def _lint(view: DataView) -> Check:
    name = "lint"
    grave = [finding for finding in view.findings if finding.level in (ERROR, WARNING) and finding.rule != "off-policy"]
    if not grave:
        return DATA.ok(name, f"{len(view.findings)} notes from spec data, none of which costs acceptance")
    first = grave[0]
    evidence = f"{first.rule}: {first.message}" + (f" (and {len(grave) - 1} more: spec data)" if len(grave) > 1 else "")
    return attrs.evolve(DATA.warning(name, evidence, first.todo), result="wrong" if first.level == ERROR else "warning")


def _on_policy(view: DataView) -> Check:
    name, policy = "on-policy", view.on_policy
    if policy is None:
        return DATA.skipped(name, "there are no prepared conversations to read")
    figures = (
        f"the verifier's greedy token equals the data's at {policy.agreement:.1%} of {policy.tokens:,} places of "
        f"{len(policy.conversations)} conversations (perplexity {policy.perplexity:.2f})"
    )
    if policy.verdict == "foreign":
        return DATA.warning(
            name,
            f"off-policy: {figures}; {policy.consequence}",
            next(finding.todo for finding in view.findings if finding.rule == "off-policy"),
        )
    return DATA.ok(name, f"{policy.verdict}: {figures}")
