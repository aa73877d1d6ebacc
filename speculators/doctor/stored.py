"""Checks what the run learnt from: its stored states, and whether it drafts new text as well as its own data."""

from __future__ import annotations

import numpy as np
import torch

from speculators.data.encoded import Conversations
from speculators.data.store import DamagedShards, StateStore
from speculators.doctor.check import Check, Family
from speculators.doctor.length import first_hits
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.doctor.trials import DraftTrials
from speculators.errors import ArtifactError
from speculators.runs.places import Places
from speculators.verifier.engine import Engine
from speculators.verifier.states_check import TOLERANCES, StatesCheck, compare_states

DATA = Family("data")
STATES, MEMORISED = "states", "memorised"
# Number of conversations to read, evenly spread, and tokens of each: about as many as the doctor's answers have.
SAMPLE, TOKENS = 8, 512
# Share of the acceptance that new text may cost, and the number of standard errors that make a loss certain.
MOST_LOSS, ERRORS = 1 / 3, 3.0


def check_states(speculator: ExaminedSpeculator, engine: Engine, places: Places) -> Check:
    """Compares a sample of the run's stored states with the verifier's, one conversation at a time."""
    origin = speculator.origin
    if origin is None:
        return DATA.skipped(STATES, speculator.origin_problem)
    key = origin.lock.fingerprints.get("capture")
    if key is None:
        return DATA.skipped(STATES, "the run stored none: it computed them during training")
    try:
        prepared = conversations_of(origin.lock.fingerprints["prepare"], places)
        store = StateStore.open(places.states(key), key=key)
        chosen = _spread(len(prepared))
        stored = store.states(chosen)
    except DamagedShards as error:
        return DATA.wrong(STATES, str(error).splitlines()[0], f"remove {error.folder}: spec run captures again")
    except ArtifactError as error:
        return DATA.skipped(STATES, f"the states are gone: {str(error).splitlines()[0]}")
    rows = [torch.from_numpy(prepared.row(index).input_ids).long() for index in chosen]
    layers, tokens = compare_states(engine, rows, stored, origin.trained["target_layer_ids"])
    dtype = str(engine.dtype).removeprefix("torch.")
    comparison = StatesCheck(
        source=store.files.place,
        dtype=dtype,
        # The coarsest dtype on the way sets the tolerance.
        states_dtype=max(dtype, origin.lock.dtypes["verifier"], store.layout.dtype, key=lambda kind: TOLERANCES[kind]),
        conversations=len(rows),
        tokens=tokens,
        layers=layers,
    )
    if comparison.problems:
        evidence = f"not what the verifier computes now: {'; '.join(comparison.problems)}"
        todo = "compare more of them with spec data --check-states; if you remove the folder, spec run captures again"
        return DATA.wrong(STATES, f"{evidence} ({comparison.source})", todo)
    worst = max(layer.error for layer in layers)
    figures = (
        f"{len(layers)} layers of {len(rows)} conversations, {tokens:,} tokens: within {worst:.1g} of the verifier's"
    )
    return DATA.ok(STATES, f"{figures} (up to {comparison.tolerance:g} is rounding)")


def check_memorised(trials: DraftTrials, places: Places) -> Check:
    """Compares acceptance on the run's own conversations with that on the prompts; a large loss means overfitting."""
    origin = trials.speculator.origin
    if origin is None:
        return DATA.skipped(MEMORISED, trials.speculator.origin_problem)
    try:
        prepared = conversations_of(origin.lock.fingerprints["prepare"], places)
    except ArtifactError as error:
        return DATA.skipped(MEMORISED, f"the prepared conversations are gone: {str(error).splitlines()[0]}")
    seen = np.array(
        [share for index in _spread(len(prepared)) if (share := _accepted(trials, prepared, index)) is not None]
    )
    new = np.array([table[:, 0].mean() for table in trials.configured.tables])
    if len(seen) == 0:
        return DATA.skipped(MEMORISED, f"no sampled conversation has an answer within its first {TOKENS} tokens")
    figures = (
        f"first drafts that equal the verifier's token: {seen.mean():.1%} in {len(seen)} conversations of its data, "
        f"{new.mean():.1%} in its answers to {len(new)} prompts"
    )
    spread = float(np.sqrt(seen.var() / len(seen) + new.var() / len(new)))
    gap = float(seen.mean() - new.mean())
    if gap > MOST_LOSS * seen.mean() and gap > ERRORS * spread:
        evidence = f"the draft has learnt its data by heart, or these prompts differ in kind: {figures}"
        todo = "train on more conversations, for fewer epochs, or on prompts like these"
        return DATA.warning(MEMORISED, evidence, todo)
    return DATA.ok(MEMORISED, figures)


def conversations_of(key: str, places: Places) -> Conversations:
    """Opens the prepared conversations of a fingerprint; raises ArtifactError if they are gone."""
    return Conversations.open(places.conversations(key), key=key)


def _accepted(trials: DraftTrials, prepared: Conversations, index: int) -> float | None:
    """Share of a conversation's supervised places whose first draft equals the verifier's token; None without any."""
    row = prepared.row(index)
    tokens, mask = torch.from_numpy(row.input_ids[:TOKENS]).long(), row.loss_mask[:TOKENS].astype(bool)
    if not mask[2:].any():
        return None
    states, last = trials.answers.engine.capture([tokens], trials.speculator.layer_ids or ())[0]
    return float(first_hits(trials, tokens, states.float(), last.float())[mask[2:]].mean())


def _spread(count: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(SAMPLE, count)).round().astype(int)).tolist()
