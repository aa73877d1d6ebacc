"""Checks that the draft vocabulary's map is consistent and that the draft can end a turn."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from speculators.doctor.check import Check, Family, listed
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.errors import SpeculatorsError
from speculators.verifier.tokens import end_of_turn, folder_stop_ids, load_tokenizer

LOADS = Family("loads")
NAME = "vocabulary map"
REMAKE = "export again: d2t[i] must be target id - i, ascending, and t2d must mark exactly these ids"


def check_vocabulary(speculator: ExaminedSpeculator) -> Iterator[Check]:
    """Yields the check of the map, then the check of the tokens that end a turn."""
    assert speculator.model is not None
    ids = speculator.model.draft_to_target.cpu()
    size = int(speculator.facts["vocab_size"])
    problem = map_problem(ids, speculator.tensors, size)
    if problem:
        yield LOADS.wrong(NAME, problem, REMAKE)
    elif len(ids) == size:
        yield LOADS.ok(NAME, f"none: the draft uses the verifier's whole vocabulary of {size:,}")
    else:
        yield LOADS.ok(NAME, f"{len(ids):,} of {size:,} tokens, ascending, both directions agree")
    yield _ends(speculator, set(ids.tolist()))


def map_problem(ids: torch.Tensor, tensors: dict[str, torch.Tensor], size: int) -> str:
    """Describes the fault of a map; "" for a sound one.

    Args:
        ids: [D] int64, the target id of each draft id.
        tensors: the checkpoint's tensors; `t2d` is compared if present.
        size: number of the verifier's tokens (V).
    """
    if "d2t" in tensors and _contains_ids(tensors["d2t"], tensors.get("t2d"), ids, size):
        return "d2t holds target ids, not offsets: every draft id would be added to its own target id"
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        first = int(outside[0])
        return f"{len(outside)} of {len(ids):,} draft ids point outside the {size:,} tokens, the first to {first}"
    falls = (ids[1:] <= ids[:-1]).nonzero()[:, 0]
    if len(falls):
        at = int(falls[0])
        twice = len(ids) - len(ids.unique())
        repeated = f"{twice} tokens have several draft ids; " if twice else ""
        return (
            f"not ascending: {repeated}draft id {at} is token {int(ids[at])}, draft id {at + 1} token "
            f"{int(ids[at + 1])} ({len(falls)} such places); a server that orders the head's rows by t2d would use the "
            "row of another token"
        )
    return _t2d_problem(ids, tensors.get("t2d"), size)


def _t2d_problem(ids: torch.Tensor, t2d: torch.Tensor | None, size: int) -> str:
    if t2d is None:
        return ""
    if t2d.shape != (size,):
        return f"t2d is {list(t2d.shape)}, but the verifier has {size} tokens: the map of another verifier"
    marked = t2d.bool().nonzero()[:, 0]
    if torch.equal(marked, ids):
        return ""
    missing = len(set(ids.tolist()) - set(marked.tolist()))
    return (
        f"d2t and t2d disagree (one of them is stale): t2d marks {len(marked):,} tokens and lacks {missing:,} of the "
        f"{len(ids):,} in d2t"
    )


def _contains_ids(d2t: torch.Tensor, t2d: torch.Tensor | None, ids: torch.Tensor, size: int) -> bool:
    """Whether `d2t` is a sound map when read as ids, and not when read as offsets."""
    ascending = len(d2t) > 1 and bool((d2t[1:] > d2t[:-1]).all() and d2t[0] >= 0 and d2t[-1] < size)
    marked = t2d is not None and t2d.shape == (size,) and torch.equal(t2d.bool().nonzero()[:, 0], d2t)
    # Offsets may ascend too, if no two neighbouring ids are in the vocabulary; then t2d decides.
    return ascending and (marked or bool(ids[-1] >= size))


def _ends(speculator: ExaminedSpeculator, known: set[int]) -> Check:
    name = "end of turn"
    try:
        tokenizer = load_tokenizer(speculator.verifier, speculator.section)
        stops = folder_stop_ids(speculator.verifier, speculator.section)
    except SpeculatorsError as error:
        return LOADS.skipped(name, str(error))
    ends = [token for token in stops if token < speculator.facts["vocab_size"]]
    labels = {token: f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ends}
    missing = [token for token in ends if token not in known]
    turn = end_of_turn(tokenizer)
    turn = tokenizer.eos_token_id if turn is None else turn
    if turn in missing:
        evidence = f"{labels[turn]} ends a turn and is not in the draft vocabulary: no draft can end an answer"
        todo = "add it to the draft vocabulary (algorithm.draft_vocab_size) and train again"
        return LOADS.wrong(name, evidence, todo)
    if missing:
        lacking = listed([labels[token] for token in missing])
        evidence = f"not in the draft vocabulary: {lacking}; the token that the chat template uses is"
        return LOADS.warning(name, evidence, "nothing, if the chat template never ends a turn with these")
    return LOADS.ok(name, f"can be drafted: {listed(list(labels.values()))}")
