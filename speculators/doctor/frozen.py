"""Are the verifier's own pieces in the checkpoint still the verifier's: head rows, embeddings, final norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import normalize

from speculators.doctor.check import Check, Family
from speculators.doctor.subject import Patient
from speculators.errors import SpeculatorsError
from speculators.verifier.weights import load_embeddings

LOADS = Family("loads")
TAKE = "give the verifier that it was trained for (--verifier), or export again"
# A bfloat16 number is within 2**-8 of what was rounded; twice that, for what was rounded on both sides.
ROUNDING = 2**-7
# Cosine of a row with the verifier's. Of a row that has nothing to do with it: 0 +- 1/sqrt(H), 0.1 at most where H is
# 64 or more, over the mean of thousands of rows far less; rows that were trained from the verifier's stay above 0.5.
UNRELATED, RELATED = 0.1, 0.5
# Rows that are looked up among the verifier's, and the share of them that must be found to call them another's.
LOOKED_UP, FOUND = 64, 0.9
SAME_ROW = 0.9999
# Names of what is taken from the verifier, for all algorithms.
HEAD, EMBEDDINGS, NORM = "lm_head.weight", "embed_tokens.weight", "verifier_norm.weight"


def check_frozen(patient: Patient, *, accepts: bool | None) -> Iterator[Check]:
    """Yields the checks of head, embeddings and norm.

    Args:
        accepts: whether drafts are accepted at all, None where that is not known: what is left to judge a head by that
            may have been trained.
    """
    assert patient.model is not None
    try:
        yield _head(patient, accepts)
        yield _embeddings(patient)
        yield _norm(patient)
    except SpeculatorsError as error:
        yield LOADS.skipped("verifier's pieces", str(error))


def _head(patient: Patient, accepts: bool | None) -> Check:
    model, name = patient.model, "head"
    assert model is not None
    if HEAD not in patient.tensors:
        return LOADS.skipped(name, f"the checkpoint has no {HEAD}: heads of its own, or the verifier's at load")
    own, ids = patient.tensors[HEAD], model.draft_to_target.cpu()
    whole = patient.head.weight
    if own.shape != (len(ids), whole.shape[1]) or len(ids) == 0 or not _within(ids, len(whole)):
        return LOADS.skipped(name, "the draft vocabulary does not fit the verifier's head: see the checks of the map")
    theirs = whole[ids]
    same, near = _same_rows(own, theirs), _cosine(own, theirs)
    if same == 1.0:
        return LOADS.ok(name, f"all {len(own):,} rows are the verifier's")
    if other := _other_rows(own, whole, ids):
        return other
    figures = f"{same:.0%} of {len(own):,} rows are the verifier's, mean cosine with them {near:.2f}"
    todo = "export or import again: a server that finds no head initialises one at random and says nothing"
    frozen = HEAD not in patient.trainable
    if patient.knobs_known and not frozen:
        if abs(near) > UNRELATED:
            return LOADS.ok(name, f"it was trained: {figures}")
        return LOADS.wrong(name, f"the head looks random: it was trained from the verifier's rows, and {figures}", todo)
    if patient.knobs_known:
        looks = "random, or another verifier's" if abs(near) < UNRELATED else "changed"
        return LOADS.wrong(name, f"the head is {looks}: training keeps the verifier's rows, and {figures}", todo)
    if near > RELATED:
        return LOADS.ok(name, f"not the verifier's rows any more, so it was trained: {figures}")
    if accepts:
        return LOADS.ok(name, f"a head of its own, and its drafts are accepted: {figures}")
    return LOADS.wrong(name, f"the head looks random: {figures}, and no draft is accepted", todo)


def _other_rows(own: torch.Tensor, whole: torch.Tensor, ids: torch.Tensor) -> Check | None:
    """Tells whose rows these are, where they are the verifier's for other tokens than the map says."""
    if _same_rows(own, whole[: len(own)]) > FOUND:
        return LOADS.wrong(
            "head",
            f"overwritten by the verifier's: row i is the verifier's row of token i, for all {len(own):,}, whatever "
            "the draft vocabulary says",
            "load the checkpoint's own lm_head after the verifier's weights, and export again",
        )
    rows = torch.linspace(0, len(own) - 1, min(LOOKED_UP, len(own))).long()
    near = normalize(own[rows].float(), dim=-1) @ normalize(whole.float(), dim=-1).T
    best, found = near.max(dim=-1)
    hits = best > SAME_ROW
    # Tied or repeated rows of the verifier: another id of the same row is no other token's.
    elsewhere = hits & (near[torch.arange(len(rows)), ids[rows]] < SAME_ROW)
    if hits.float().mean() < FOUND or not elsewhere.any():
        return None
    at = int(elsewhere.nonzero()[0, 0])
    row = int(rows[at])
    return LOADS.wrong(
        "head",
        f"the vocabulary map is not the one of this head (stale?): row {row} is the verifier's row of token "
        f"{int(found[at])}, and the map says {int(ids[row])}; so for {float(elsewhere.float().mean()):.0%} of "
        f"{len(rows)} rows looked up",
        "take d2t and t2d of the run that trained this head: the draft vocabulary follows the data",
    )


def _embeddings(patient: Patient) -> Check:
    name = "embeddings"
    if EMBEDDINGS not in patient.tensors:
        return LOADS.skipped(name, f"the checkpoint has no {EMBEDDINGS}: taken from the verifier at load, or not read")
    own, theirs = patient.tensors[EMBEDDINGS], load_embeddings(patient.verifier)
    if own.shape != theirs.shape:
        words = f"{list(own.shape)}, the verifier's are {list(theirs.shape)}"
        return LOADS.wrong(name, f"of another verifier: {words}", TAKE)
    same, near = _same_rows(own, theirs), _cosine(own, theirs)
    if same == 1.0:
        return LOADS.ok(name, f"all {len(own):,} rows are the verifier's")
    figures = f"{same:.0%} of {len(own):,} rows are the verifier's, mean cosine with them {near:.2f}"
    if near < RELATED or patient.knobs_known:
        todo = TAKE
        return LOADS.wrong(name, f"of another verifier, or random: {figures}", todo)
    return LOADS.warning(name, f"trained, or of a sibling of the verifier: {figures}", "see that acceptance is as told")


def _norm(patient: Patient) -> Check:
    name = "verifier's norm"
    if NORM not in patient.tensors:
        return LOADS.skipped(name, f"the checkpoint has no {NORM}: it does not apply the verifier's final norm")
    own, head = patient.tensors[NORM].float(), patient.head
    factor = head.norm_weight.float()
    theirs = 1 + factor if head.unit_offset else factor
    if own.shape == theirs.shape and _same_rows(own[:, None], theirs[:, None]) == 1.0:
        return LOADS.ok(name, f"the verifier's final norm, x * {'(1 + w)' if head.unit_offset else 'w'}")
    kind = ""
    if own.shape == theirs.shape and head.unit_offset and _same_rows(own[:, None], factor[:, None]) == 1.0:
        kind = ": the verifier multiplies by (1 + w), and the copy has w"
    words = f"not the verifier's final norm{kind}"
    return LOADS.wrong(name, words, TAKE)


def _same_rows(own: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the share of rows that are equal but for the rounding of 16 bits."""
    own, theirs = own.float(), theirs.float()
    return float(((own - theirs).abs() <= ROUNDING * theirs.abs() + 1e-6).all(dim=-1).float().mean())


def _cosine(own: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((normalize(own.float(), dim=-1) * normalize(theirs.float(), dim=-1)).sum(-1).mean())


def _within(ids: torch.Tensor, size: int) -> bool:
    return bool((ids >= 0).all() and (ids < size).all())
