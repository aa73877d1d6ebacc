"""Alternatives of what belongs to the verifier or to the file: head, embeddings, draft vocabulary, 16-bit format."""

from __future__ import annotations

import torch

from speculators.doctor.alternative import Alternative, Alternatives, with_values
from speculators.doctor.frozen import EMBEDDINGS, HEAD
from speculators.doctor.trials import DraftTrials
from speculators.verifier.weights import load_embeddings

OFFSETS = "d2t"
OTHER_FORMAT = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}


def head_and_embeddings(trials: DraftTrials) -> Alternatives:
    """The verifier's head or embeddings instead of the checkpoint's, or one of its own for the other."""
    speculator, ids = trials.speculator, trials.model.draft_to_target.cpu()
    own = {name: speculator.tensors[name] for name in (HEAD, EMBEDDINGS) if name in speculator.tensors}
    if not own:
        return "the checkpoint has no head and no embeddings of its own"
    whole, size = speculator.head.weight, int(speculator.facts["vocab_size"])
    embeddings = own.get(EMBEDDINGS)
    inside = bool(((ids >= 0) & (ids < size)).all())
    ways = [
        ("the verifier's head", HEAD, whole[ids] if inside else None),
        ("the embeddings as head", HEAD, embeddings[ids] if embeddings is not None and inside else None),
        ("the verifier's embeddings", EMBEDDINGS, load_embeddings(speculator.verifier)),
        ("the head as embeddings", EMBEDDINGS, own.get(HEAD) if len(ids) == size else None),
    ]
    others = [
        _instead(what, name, tensor)
        for what, name, tensor in ways
        if name in own and tensor is not None and _differs(own[name], tensor)
    ]
    return others or "head and embeddings equal the verifier's"


def _differs(own: torch.Tensor, other: torch.Tensor) -> bool:
    return own.shape == other.shape and not torch.equal(own.float(), other.float())


def _instead(what: str, name: str, tensor: torch.Tensor) -> Alternative:
    means = f"the draft was trained with {what}, and the checkpoint has another {name}"
    todo = f"write {what} into {name} of model.safetensors (tied or untied differently when it was exported)"
    return with_values(what, means, todo, lambda: {name: tensor})


def draft_vocabulary(trials: DraftTrials) -> Alternatives:
    """Each draft id one token lower or higher."""
    offsets = dict(trials.model.named_buffers()).get(OFFSETS)
    if offsets is None:
        return "the draft uses the verifier's whole vocabulary"
    last = int(trials.speculator.facts["vocab_size"]) - 1
    own = torch.arange(len(offsets), device=offsets.device)

    def moved(step: int) -> Alternative:
        new = (own + offsets + step).clamp(0, last) - own
        means = f"the draft vocabulary is off by one: each draft id stands for the token {step:+d} from d2t's"
        return with_values(
            f"d2t {step:+d}", means, f"add {step:+d} to d2t, and mark these ids in t2d", lambda: {OFFSETS: new}
        )

    return [moved(-1), moved(1)]


def number_format(trials: DraftTrials) -> Alternatives:
    """The bits of a 16-bit file read as the other 16-bit format."""
    kinds = {tensor.dtype for tensor in trials.speculator.tensors.values() if tensor.is_floating_point()}
    narrow = sorted(kinds & set(OTHER_FORMAT), key=str)
    others = [_as_other(trials, kind) for kind in narrow]
    return [one for one in others if one is not None] or "the file's numbers make sense in one format only"


def _as_other(trials: DraftTrials, kind: torch.dtype) -> Alternative | None:
    other = OTHER_FORMAT[kind]
    saved = set(dict(trials.model.named_parameters()))
    values = {
        name: tensor.view(other).float()
        for name, tensor in trials.speculator.tensors.items()
        if tensor.dtype == kind and name in saved
    }
    if not values or not all(torch.isfinite(tensor).all() for tensor in values.values()):
        return None
    names = [str(one).removeprefix("torch.") for one in (other, kind)]
    means = f"the numbers are {names[0]}, but model.safetensors calls them {names[1]}"
    return with_values(
        f"bits read as {names[0]}", means, "export again, and set the dtype that the tensors have", lambda: values
    )
