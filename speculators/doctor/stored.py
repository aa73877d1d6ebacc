"""What the run learnt from: are its stored states the verifier's own, and does it draft new text as well as its own."""

from __future__ import annotations

import numpy as np
import torch

from speculators.data.encoded import Conversations
from speculators.data.store import StateStore
from speculators.doctor.alignment import Bench
from speculators.doctor.check import Check, Family
from speculators.doctor.length import first_hits
from speculators.doctor.subject import Patient
from speculators.errors import ArtifactError
from speculators.runs.places import Places
from speculators.verifier.engine import Engine
from speculators.verifier.states_check import TOLERANCES, StatesCheck, compare_states

DATA = Family("data")
STATES, MEMORISED = "states", "memorised"
# Conversations that are read, evenly spread over all, and tokens of each: as many as the doctor's own answers have.
SAMPLE, TOKENS = 8, 512
# Of the acceptance on its own conversations, what new text may cost; and by how many standard errors it must be told.
MOST_LOSS, ERRORS = 1 / 3, 3.0


def check_states(patient: Patient, engine: Engine, places: Places) -> Check:
    """Compares some of the states that the run was trained on with the verifier's, one conversation at a time."""
    origin = patient.origin
    if origin is None:
        return DATA.skipped(STATES, f"nothing records what it was trained with: {patient.no_origin}")
    key = origin.lock.fingerprints.get("capture")
    if key is None:
        return DATA.skipped(STATES, "the run stored none: they were computed while it was trained")
    try:
        prepared = conversations_of(origin.lock.fingerprints["prepare"], places)
        store = StateStore.open(places.states(key), key=key)
    except ArtifactError as error:
        return DATA.skipped(STATES, f"they are gone: {str(error).splitlines()[0]}")
    chosen = _spread(len(prepared))
    rows = [torch.from_numpy(prepared.row(index).input_ids).long() for index in chosen]
    layers, tokens = compare_states(engine, rows, store.states(chosen), origin.trained["target_layer_ids"])
    here = str(engine.dtype).removeprefix("torch.")
    found = StatesCheck(
        source=str(store.folder),
        dtype=here,
        # What rounds most on the way decides how far off they may be.
        states_dtype=max(here, origin.lock.dtypes["verifier"], store.layout.dtype, key=lambda kind: TOLERANCES[kind]),
        conversations=len(rows),
        tokens=tokens,
        layers=layers,
    )
    if found.problems:
        words = f"not what the verifier computes here: {'; '.join(found.problems)}"
        todo = "spec data --check-states compares more of them; remove the folder, and spec run captures them again"
        return DATA.wrong(STATES, f"{words} ({found.source})", todo)
    worst = max(layer.error for layer in layers)
    told = (
        f"{len(layers)} layers of {len(rows)} conversations, {tokens:,} tokens: the verifier's own within {worst:.1g}"
    )
    return DATA.ok(STATES, f"{told} ({found.tolerance:g} is rounding)")


def check_memorised(bench: Bench, places: Places) -> Check:
    """Compares acceptance on conversations of the run's data with that on the prompts: far less is overfitting."""
    origin = bench.patient.origin
    if origin is None:
        return DATA.skipped(MEMORISED, f"nothing records what it was trained on: {bench.patient.no_origin}")
    try:
        prepared = conversations_of(origin.lock.fingerprints["prepare"], places)
    except ArtifactError as error:
        return DATA.skipped(MEMORISED, f"the prepared conversations are gone: {str(error).splitlines()[0]}")
    seen = np.array(
        [share for index in _spread(len(prepared)) if (share := _accepted(bench, prepared, index)) is not None]
    )
    new = np.array([table[:, 0].mean() for table in bench.configured.tables])
    if len(seen) == 0:
        return DATA.skipped(MEMORISED, "no conversation of the data has an answer in its first tokens")
    told = (
        f"first drafts that are the verifier's token: {seen.mean():.1%} in {len(seen)} conversations of its data, "
        f"{new.mean():.1%} in its answers to {len(new)} prompts"
    )
    spread = float(np.sqrt(seen.var() / len(seen) + new.var() / len(new)))
    gap = float(seen.mean() - new.mean())
    if gap > MOST_LOSS * seen.mean() and gap > ERRORS * spread:
        words = f"it has learnt its data by heart, or these prompts are of another kind: {told}"
        return DATA.warning(MEMORISED, words, "train on more conversations, fewer epochs, or on prompts like these")
    return DATA.ok(MEMORISED, told)


def conversations_of(key: str, places: Places) -> Conversations:
    """Returns the prepared conversations of a fingerprint; raises ArtifactError where they are gone."""
    return Conversations.open(places.conversations(key), key=key)


def _accepted(bench: Bench, prepared: Conversations, index: int) -> float | None:
    """Returns the share of a conversation's supervised places whose first draft is what the verifier says."""
    row = prepared.row(index)
    tokens, mask = torch.from_numpy(row.input_ids[:TOKENS]).long(), row.loss_mask[:TOKENS].astype(bool)
    if not mask[2:].any():
        return None
    states, last = bench.answers.engine.capture([tokens], bench.patient.layer_ids or ())[0]
    return float(first_hits(bench, tokens, states.float(), last.float())[mask[2:]].mean())


def _spread(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).round().astype(int)).tolist()
