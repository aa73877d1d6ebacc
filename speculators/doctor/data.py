"""What was the run trained on: the loss mask as it is kept, the template's rendering, what `spec data` finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import attrs
import numpy as np

from speculators.data.conversations import Conversation
from speculators.data.encoded import Conversations
from speculators.data.template import ChatTemplate
from speculators.doctor.check import Check, Family
from speculators.doctor.stored import conversations_of
from speculators.doctor.subject import Origin, Patient
from speculators.errors import ArtifactError, SpeculatorsError
from speculators.events import Listen, ignore
from speculators.facts import VerifierFacts
from speculators.inspection.inspect import inspect_data
from speculators.inspection.survey import raw_rows
from speculators.inspection.view import ERROR, WARNING, DataView
from speculators.pipeline.regenerate import is_whole
from speculators.recipe.input_sections import DataSource
from speculators.recipe.lock_check import relocate
from speculators.recipe.plan import make_plan
from speculators.recipe.schema import Recipe
from speculators.runs.places import Places, RunFolder
from speculators.runs.stages import made
from speculators.verifier.tokens import load_tokenizer

DATA = Family("data")
# Conversations that the verifier reads to tell how on-policy they are, and that are rendered again.
SAMPLE, RENDERED = 8, 16
# Of all tokens: a chat's prompt and the frame of its turns are at least a twentieth of it.
MOST_SUPERVISED = 0.95
PROMISED = ("as prepared", "loss mask", "rendering", "lint", "on-policy")
NOTHING = "the checkpoint is in no run that kept its data"


def check_data(patient: Patient, places: Places, listen: Listen = ignore) -> Iterator[Check]:
    """Yields the checks of the run's own data, as far as it is still there."""
    origin = patient.origin
    if origin is None:
        for name in PROMISED:
            yield DATA.skipped(name, f"{NOTHING}: {patient.no_origin}")
        return
    recipe, lost = relocate(origin.recipe, origin.lock, origin.folder)
    if lost:
        for name in PROMISED:
            yield DATA.skipped(name, f"the run's data is not there any more: {lost[0]}")
        return
    plan = make_plan(recipe, VerifierFacts(origin.lock.verifier.config), world_size=1)
    key = origin.lock.fingerprints["prepare"]
    try:
        # Not where the plan would look: a verifier that was changed has another fingerprint.
        prepared = conversations_of(key, places)
    except ArtifactError as error:
        for name in PROMISED:
            yield DATA.skipped(name, f"the prepared conversations are gone: {str(error).splitlines()[0]}")
        return
    intact = _kept(origin, prepared)
    yield intact
    yield check_mask(prepared)
    yield _rendering(patient, _sources(recipe, places, key), prepared, recipe.data.max_tokens)
    if intact.result == "wrong" or plan.stage("prepare").fingerprint != key:
        why = "the kept data, or the verifier, is not the one of training"
        yield DATA.skipped("lint", why)
        yield DATA.skipped("on-policy", why)
        return
    yield from _looked(recipe, places, listen)


def _kept(origin: Origin, prepared: Conversations) -> Check:
    """Compares the kept conversations with what the run noted when it made them."""
    run = RunFolder(origin.folder)
    name, noted = "as prepared", made(run)["prepare"].files if "prepare" in made(run) else {}
    if not noted:
        return DATA.skipped(
            name, f"{origin.folder} did not note what it made (no {run.made.name}), so nothing can be compared"
        )
    try:
        Conversations.open(prepared.folder, verify=True)
        now = {file: held["sha256"] for file, held in prepared.manifest["files"].items()}
        changed = sorted(file for file in {*noted, *now} if noted.get(file) != now.get(file))
        words = f"{', '.join(changed)}: not what the run was trained on (sha256)"
    except ArtifactError as error:
        changed, words = ["?"], str(error).splitlines()[0]
    if changed:
        return DATA.wrong(name, words, "spec run of its recipe prepares it again")
    return DATA.ok(name, f"{len(prepared):,} conversations, files as the run noted them (sha256)")


def check_mask(prepared: Conversations) -> Check:
    """Looks at how much is supervised: nothing, everything, or answers."""
    name = "loss mask"
    masks = [prepared.row(index).loss_mask for index in range(len(prepared))]
    shares = np.array([mask.mean() for mask in masks])
    total, tokens = sum(int(mask.sum()) for mask in masks), int(prepared.lengths.sum())
    share = total / max(1, tokens)
    none, full = int((shares == 0).sum()), int((shares >= MOST_SUPERVISED).sum())
    told = f"{total:,} of {tokens:,} tokens are supervised ({share:.1%}), "
    told += f"{shares.min():.0%} to {shares.max():.0%} of a conversation"
    if total == 0:
        words = f"nothing is supervised (all-zero mask): training ran at zero loss; {told}"
        return DATA.wrong(
            name, words, "look at the mask (spec data RECIPE --show 3); mend template or data, train again"
        )
    if share > MOST_SUPERVISED:
        words = f"the prompt is supervised, too (all-ones mask): {told}"
        return DATA.wrong(name, words, "mend the template's {% generation %} markers, or leave them out; train again")
    if none or full:
        words = f"{none} conversations have no supervised token, {full} have nearly all: {told}"
        return DATA.warning(name, words, "look at these (spec data RECIPE --id ID)")
    return DATA.ok(name, told)


def _rendering(patient: Patient, sources: Iterable[Conversation], prepared: Conversations, max_tokens: int) -> Check:
    """Renders some of the conversations again and compares tokens and mask."""
    name = "rendering"
    template = ChatTemplate.of(load_tokenizer(patient.verifier, trust_remote_code=patient.trust_remote_code))
    ids = {one: index for index, one in enumerate(prepared.ids())}
    conversations = (row for row in sources if row.id in ids)
    wrong, seen = "", 0
    for conversation in islice(conversations, RENDERED):
        seen += 1
        held, now = prepared.row(ids[conversation.id]), template.encode(conversation, max_tokens)
        if isinstance(now, str):
            wrong = wrong or f"{conversation.id}: {now}"
        elif not np.array_equal(held.input_ids, now.input_ids):
            wrong = wrong or f"{conversation.id}: other tokens ({len(held.input_ids)} kept, {len(now.input_ids)} now)"
        elif not np.array_equal(held.loss_mask, now.loss_mask):
            at = int((held.loss_mask != now.loss_mask).nonzero()[0][0])
            shifted = any(np.array_equal(held.loss_mask[1:], np.roll(now.loss_mask, step)[1:]) for step in (-1, 1))
            words = f"the mask is shifted by one from token {at} on" if shifted else f"another mask from token {at} on"
            wrong = wrong or f"{conversation.id}: {words}"
    if not seen:
        return DATA.skipped(name, "no source has the kept conversations any more")
    if wrong:
        words = f"the verifier's tokenizer and chat template do not give what was trained on: {wrong}"
        return DATA.wrong(name, words, "give tokenizer and template of training to the verifier, or train again")
    return DATA.ok(name, f"{seen} conversations rendered again: the same tokens and mask")


def _sources(recipe: Recipe, places: Places, key: str) -> Iterator[Conversation]:
    sources = recipe.data.sources
    if recipe.data.regenerate is not None:
        file = places.answers(key)
        sources = (DataSource(path=str(file)),) if is_whole(file) else ()
    for row in raw_rows(sources, Path()):
        if not isinstance(row.conversation, str):
            yield row.conversation


def _looked(recipe: Recipe, places: Places, listen: Listen) -> Iterator[Check]:
    """Yields what `spec data` finds."""
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
        return DATA.ok(name, f"{len(view.findings)} notes of spec data, nothing that costs acceptance")
    first = grave[0]
    words = f"{first.rule}: {first.message}" + (f" (and {len(grave) - 1} more: spec data)" if len(grave) > 1 else "")
    return attrs.evolve(DATA.warning(name, words, first.todo), result="wrong" if first.level == ERROR else "warning")


def _on_policy(view: DataView) -> Check:
    name, policy = "on-policy", view.on_policy
    if policy is None:
        return DATA.skipped(name, "there are no prepared conversations to read")
    told = (
        f"the verifier's greedy token is the data's at {policy.agreement:.1%} of {policy.tokens:,} places of "
        f"{len(policy.conversations)} conversations (perplexity {policy.perplexity:.2f})"
    )
    if policy.verdict == "foreign":
        return DATA.warning(
            name, f"off-policy: {told}; {policy.consequence}", "let the verifier answer: [data.regenerate]"
        )
    return DATA.ok(name, f"{policy.verdict}: {told}")
