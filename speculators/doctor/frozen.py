"""Checks that tensors copied from the verifier still equal it: head rows, embeddings, final norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import normalize

from speculators.doctor.check import Check, Family
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.errors import SpeculatorsError
from speculators.verifier.weights import load_embeddings

LOADS = Family("loads")
USE_ITS_VERIFIER = "give the verifier that it was trained for (--verifier), or export again"
# Rounding to bfloat16 changes a number by at most 2**-8; both sides may be rounded.
ROUNDING = 2**-7
# Mean cosine between rows and the verifier's. Unrelated rows give 0 +- 1/sqrt(H) each, so the mean of thousands stays
# far below 0.1; rows that were trained from the verifier's stay above 0.5.
UNRELATED, RELATED = 0.1, 0.5
# Number of rows to look up among the verifier's, and the share that must match to call the head another token's.
LOOKED_UP, MATCHED = 64, 0.9
SAME_ROW = 0.9999
# Names under which every algorithm saves tensors of the verifier.
HEAD, EMBEDDINGS, NORM = "lm_head.weight", "embed_tokens.weight", "verifier_norm.weight"


def check_frozen(speculator: ExaminedSpeculator, *, accepts: bool | None) -> Iterator[Check]:
    """Yields the checks of head, embeddings and norm.

    Args:
        speculator: the loaded speculator.
        accepts: whether drafts are accepted at all, which decides about a head that may have been trained; None if
            unknown.
    """
    assert speculator.model is not None
    try:
        yield _head(speculator, accepts)
        yield _embeddings(speculator)
        yield _norm(speculator)
    except SpeculatorsError as error:
        yield LOADS.skipped("verifier's pieces", str(error))


def _head(speculator: ExaminedSpeculator, accepts: bool | None) -> Check:
    model, name = speculator.model, "head"
    assert model is not None
    if HEAD not in speculator.tensors:
        return LOADS.skipped(name, f"the checkpoint has no {HEAD}: it has heads of its own, or uses the verifier's")
    own, ids = speculator.tensors[HEAD], model.draft_to_target.cpu()
    whole = speculator.head.weight
    if own.shape != (len(ids), whole.shape[1]) or len(ids) == 0 or not _within(ids, len(whole)):
        return LOADS.skipped(name, "the draft vocabulary does not fit the verifier's head: see the vocabulary map")
    theirs = whole[ids]
    same, near = _same_rows(own, theirs), _cosine(own, theirs)
    if same == 1.0:
        return LOADS.ok(name, f"all {len(own):,} rows are the verifier's")
    if check := _other_rows(own, whole, ids):
        return check
    figures = f"{same:.0%} of {len(own):,} rows are the verifier's, mean cosine {near:.2f}"
    todo = "export or import again: a server that finds no head silently initialises one at random"
    frozen = HEAD not in speculator.trainable
    if speculator.knobs_known and not frozen:
        if abs(near) > UNRELATED:
            return LOADS.ok(name, f"trained from the verifier's rows: {figures}")
        return LOADS.wrong(name, f"the head looks random, but it was trained from the verifier's rows: {figures}", todo)
    if speculator.knobs_known:
        looks = "random, or another verifier's" if abs(near) < UNRELATED else "changed"
        return LOADS.wrong(name, f"the head is {looks}, but training keeps the verifier's rows: {figures}", todo)
    if near > RELATED:
        return LOADS.ok(name, f"related to the verifier's rows, so it was trained: {figures}")
    if accepts:
        return LOADS.ok(name, f"the draft has a head of its own, and its drafts are accepted: {figures}")
    return LOADS.wrong(name, f"the head looks random: {figures}, and no draft is accepted", todo)


def _other_rows(own: torch.Tensor, whole: torch.Tensor, ids: torch.Tensor) -> Check | None:
    """Detects rows that are the verifier's, but belong to different tokens from those in the map."""
    if _same_rows(own, whole[: len(own)]) > MATCHED:
        return LOADS.wrong(
            "head",
            f"overwritten by the verifier's: each of the {len(own):,} rows i is the verifier's row of token i, "
            "whatever the draft vocabulary says",
            "load the checkpoint's own lm_head after the verifier's weights, and export again",
        )
    rows = torch.linspace(0, len(own) - 1, min(LOOKED_UP, len(own))).long()
    near = normalize(own[rows].float(), dim=-1) @ normalize(whole.float(), dim=-1).T  # [LOOKED_UP, V]
    best, best_ids = near.max(dim=-1)
    hits = best > SAME_ROW
    # The verifier may repeat a row: another id with the same row is not a mismatch.
    elsewhere = hits & (near[torch.arange(len(rows)), ids[rows]] < SAME_ROW)
    if hits.float().mean() < MATCHED or not elsewhere.any():
        return None
    at = int(elsewhere.nonzero()[0, 0])
    row = int(rows[at])
    return LOADS.wrong(
        "head",
        f"the vocabulary map does not belong to this head (stale?): row {row} is the verifier's row of token "
        f"{int(best_ids[at])}, and the map says {int(ids[row])}; {float(elsewhere.float().mean()):.0%} of {len(rows)} "
        "sampled rows disagree",
        "use d2t and t2d of the run that trained this head: the draft vocabulary follows from its data",
    )


def _embeddings(speculator: ExaminedSpeculator) -> Check:
    name = "embeddings"
    if EMBEDDINGS not in speculator.tensors:
        return LOADS.skipped(name, f"the checkpoint has no {EMBEDDINGS}: it uses the verifier's, or none")
    own, theirs = speculator.tensors[EMBEDDINGS], load_embeddings(speculator.verifier)
    if own.shape != theirs.shape:
        shapes = f"{list(own.shape)}, the verifier's are {list(theirs.shape)}"
        return LOADS.wrong(name, f"of another verifier: {shapes}", USE_ITS_VERIFIER)
    same, near = _same_rows(own, theirs), _cosine(own, theirs)
    if same == 1.0:
        return LOADS.ok(name, f"all {len(own):,} rows are the verifier's")
    figures = f"{same:.0%} of {len(own):,} rows are the verifier's, mean cosine {near:.2f}"
    if near < RELATED or speculator.knobs_known:
        return LOADS.wrong(name, f"of another verifier, or random: {figures}", USE_ITS_VERIFIER)
    todo = "compare the acceptance above with the published one"
    return LOADS.warning(name, f"trained, or of a sibling of the verifier: {figures}", todo)


def _norm(speculator: ExaminedSpeculator) -> Check:
    name = "verifier's norm"
    if NORM not in speculator.tensors:
        return LOADS.skipped(name, f"the checkpoint has no {NORM}: the draft does not apply the verifier's final norm")
    own, head = speculator.tensors[NORM].float(), speculator.head
    factor = head.norm_weight.float()
    theirs = 1 + factor if head.unit_offset else factor
    if own.shape == theirs.shape and _same_rows(own[:, None], theirs[:, None]) == 1.0:
        return LOADS.ok(name, f"equal to the verifier's final norm, x * {'(1 + w)' if head.unit_offset else 'w'}")
    kind = ""
    if own.shape == theirs.shape and head.unit_offset and _same_rows(own[:, None], factor[:, None]) == 1.0:
        kind = ": the verifier multiplies by (1 + w), but the copy stores w"
    return LOADS.wrong(name, f"not the verifier's final norm{kind}", USE_ITS_VERIFIER)


def _same_rows(own: torch.Tensor, theirs: torch.Tensor) -> float:
    """Share of rows that are equal up to 16-bit rounding."""
    own, theirs = own.float(), theirs.float()
    return float(((own - theirs).abs() <= ROUNDING * theirs.abs() + 1e-6).all(dim=-1).float().mean())


def _cosine(own: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((normalize(own.float(), dim=-1) * normalize(theirs.float(), dim=-1)).sum(-1).mean())


def _within(ids: torch.Tensor, size: int) -> bool:
    return bool((ids >= 0).all() and (ids < size).all())
