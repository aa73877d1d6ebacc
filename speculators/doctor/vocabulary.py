"""Is the draft vocabulary's map consistent, and can the draft end a turn."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from speculators.doctor.check import Check, Family, listed
from speculators.doctor.subject import Patient
from speculators.errors import SpeculatorsError
from speculators.verifier.tokens import end_of_turn, folder_stop_ids, load_tokenizer

LOADS = Family("loads")
NAME = "vocabulary map"
REMAKE = "export again: d2t[i] is target id - i, ascending, and t2d marks exactly these ids"


def check_vocabulary(patient: Patient) -> Iterator[Check]:
    """Yields the check of the map, then that of the tokens that end a turn."""
    assert patient.model is not None
    ids = patient.model.draft_to_target.cpu()
    size = int(patient.facts["vocab_size"])
    problem = map_problem(ids, patient.tensors, size)
    if problem:
        yield LOADS.wrong(NAME, problem, REMAKE)
    elif len(ids) == size:
        yield LOADS.ok(NAME, f"none: the draft has the verifier's whole vocabulary of {size:,}")
    else:
        yield LOADS.ok(NAME, f"{len(ids):,} of {size:,} tokens, ascending, both directions agree")
    yield _ends(patient, set(ids.tolist()))


def map_problem(ids: torch.Tensor, tensors: dict[str, torch.Tensor], size: int) -> str:
    """Returns what is wrong with a map, "" if nothing is.

    Args:
        ids: [D] int64, the target id of each draft id.
        tensors: of the checkpoint; `t2d` is compared where it has one.
        size: V.
    """
    if "d2t" in tensors and _holds_ids(tensors["d2t"], tensors.get("t2d"), ids, size):
        return "d2t holds target ids, not offsets: every draft id would be added to its own target id"
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        first = int(outside[0])
        return f"{len(outside)} of {len(ids):,} draft ids lead outside of the {size:,} tokens, the first to {first}"
    falls = (ids[1:] <= ids[:-1]).nonzero()[:, 0]
    if len(falls):
        at = int(falls[0])
        twice = len(ids) - len(ids.unique())
        words = f"{twice} tokens have several draft ids; " if twice else ""
        return (
            f"not ascending: {words}draft id {at} is token {int(ids[at])}, draft id {at + 1} token {int(ids[at + 1])} "
            f"({len(falls)} such places); a server that orders the head's rows by t2d takes another token's"
        )
    return _t2d_problem(ids, tensors.get("t2d"), size)


def _t2d_problem(ids: torch.Tensor, t2d: torch.Tensor | None, size: int) -> str:
    if t2d is None:
        return ""
    if t2d.shape != (size,):
        return f"t2d is {list(t2d.shape)}, the verifier has {size} tokens: the map of another verifier"
    marked = t2d.bool().nonzero()[:, 0]
    if torch.equal(marked, ids):
        return ""
    missing = len(set(ids.tolist()) - set(marked.tolist()))
    return (
        f"d2t and t2d disagree (one of them is stale): t2d marks {len(marked):,} tokens, {missing:,} of the "
        f"{len(ids):,} that d2t gives are not among them"
    )


def _holds_ids(d2t: torch.Tensor, t2d: torch.Tensor | None, ids: torch.Tensor, size: int) -> bool:
    """Whether `d2t` itself is a map without fault, and what it means as offsets is none."""
    ascending = len(d2t) > 1 and bool((d2t[1:] > d2t[:-1]).all() and d2t[0] >= 0 and d2t[-1] < size)
    marked = t2d is not None and t2d.shape == (size,) and torch.equal(t2d.bool().nonzero()[:, 0], d2t)
    # Offsets may ascend, too, where no two neighbours are in the vocabulary; t2d then decides.
    return ascending and (marked or bool(ids[-1] >= size))


def _ends(patient: Patient, known: set[int]) -> Check:
    name = "end of turn"
    trust = patient.trust_remote_code
    try:
        tokenizer = load_tokenizer(patient.verifier, trust_remote_code=trust)
        stops = folder_stop_ids(patient.verifier, trust_remote_code=trust)
    except SpeculatorsError as error:
        return LOADS.skipped(name, str(error))
    ends = [token for token in stops if token < patient.facts["vocab_size"]]
    told = {token: f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ends}
    missing = [token for token in ends if token not in known]
    turn = end_of_turn(tokenizer)
    turn = tokenizer.eos_token_id if turn is None else turn
    if turn in missing:
        words = f"{told[turn]} ends a turn and is not in the draft vocabulary: no draft can end an answer"
        return LOADS.wrong(name, words, "put it into the draft vocabulary and train again (algorithm.draft_vocab_size)")
    if missing:
        words = f"not in the draft vocabulary: {listed([told[token] for token in missing])}; the turn's own end is"
        return LOADS.warning(name, words, "nothing, if the chat template never ends a turn so")
    return LOADS.ok(name, f"can be drafted: {listed(list(told.values()))}")
