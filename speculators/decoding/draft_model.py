"""Drafts with any smaller causal language model that has the verifier's tokenizer; needs no training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import DynamicCache

from speculators.decoding.cache import Mark, check_continues, is_recurrent, mark, new_cache, rewind
from speculators.drafter import Proposal, chain
from speculators.errors import RecipeError, VerifierError
from speculators.events import Progress, ignore
from speculators.recipe.input_sections import VerifierSection
from speculators.structure.converter import structure
from speculators.verifier.capture import cache_name
from speculators.verifier.engine import Engine
from speculators.verifier.responding import RespondingVerifier
from speculators.verifier.sources import obtain

PINS = "a hub id may end in @REVISION, a .gguf file (also a wheel's) in @SHA256"


def load_draft_model(
    source: str, verifier: RespondingVerifier, *, base: Path = Path(), progress: Progress = ignore
) -> DraftModel:
    """Loads a draft model in the verifier's dtype, on its device.

    Args:
        source: as `verifier.model` of a recipe; a hub id may end in `@REVISION`, a GGUF file (also
            a wheel's) in `@SHA256`.
        verifier: the model to draft for.
        base: folder that a relative path starts from.
        progress: receives reports of downloads and conversions.

    Raises:
        RecipeError: `source` does not name a model.
        VerifierError: the model cannot be loaded, or its tokenizer differs from the verifier's.
    """
    folder = obtain(pinned(source, "draft_model"), base=base.absolute(), progress=progress)
    draft = Engine(folder, dtype=verifier.dtype, device=verifier.device)
    check_same_tokenizer(draft.tokenizer, verifier.tokenizer, f"the draft model {source}")
    return DraftModel(draft.model, vocab_size=verifier.facts.vocab_size)


def check_same_tokenizer(draft: Any, verifier: Any, name: str) -> None:
    """Checks that every id means the same token to both models, since drafts are proposed as ids.

    Args:
        draft: a transformers tokenizer.
        verifier: a transformers tokenizer.
        name: of the draft model, for the error.

    Raises:
        VerifierError: some id differs; names the first.
    """
    own, theirs = ({index: token for token, index in each.get_vocab().items()} for each in (draft, verifier))
    if own == theirs:
        return
    first = min(index for index in {*own, *theirs} if own.get(index) != theirs.get(index))
    sizes = f"{len(own)} tokens against {len(theirs)}" if len(own) != len(theirs) else f"both have {len(own)} tokens"
    token, expected = (repr(each[first]) if first in each else "no token" for each in (own, theirs))
    raise VerifierError(
        f"the tokenizer of {name} differs from the verifier's: {sizes}; id {first} is {token}, the verifier's is"
        f" {expected}",
        hint="a draft model proposes the verifier's own ids: take a smaller model of the same family",
    )


def pinned(source: str, key: str) -> VerifierSection:
    """Parses `source` as `load_draft_model` does; a RecipeError names `key`."""
    model, pin = source, None
    if "@" in source and not source.startswith(("/", "./", "../", "~")):
        model, _, pin = source.rpartition("@")
    kind = "sha256" if model.endswith(".gguf") else "revision"
    section, problems = structure({"model": model, kind: pin}, VerifierSection, path=(key,))
    if section is None:
        raise RecipeError([replace(problem, hint=problem.hint or PINS) for problem in problems])
    return section


class DraftModel:
    """A causal language model that drafts, live and in replay.

    Args:
        model: a transformers causal language model, in evaluation mode.
        vocab_size: of the verifier. Embedding rows of the draft model beyond it are never drafted, and verifier ids
            that it has no row for are read as its last row. Both are padding of embedding matrices, not tokens.
    """

    def __init__(self, model: Any, *, vocab_size: int) -> None:
        self.model = model
        self.vocab_size = vocab_size
        self.rows = model.get_input_embeddings().num_embeddings
        self.recurrent = is_recurrent(model)
        if self.recurrent:
            check_continues(model)
        self.draft_to_target = torch.arange(min(self.rows, vocab_size), device=model.device)

    def draft(self) -> DraftModelDrafter:
        """Makes a drafter that decodes with this model."""
        return DraftModelDrafter(self)

    def logits(self, tokens: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """Computes the float32 logits [n, D] after each of n tokens; with a cache only those after the last, [1, D].

        Args:
            tokens: [n] int64, which continue those in the cache.
        """
        start = 0 if cache is None else cache.get_seq_length()
        # Ids beyond the draft model's rows are padding of the verifier's matrix, and never occur in text.
        output = self.model(
            input_ids=tokens.clamp_max(self.rows - 1)[None],
            position_ids=torch.arange(start, start + len(tokens), device=tokens.device)[None],
            use_cache=cache is not None,
            logits_to_keep=0 if cache is None else 1,
            **{cache_name(self.model): cache},
        )
        return output.logits[0, :, : len(self.draft_to_target)].float()

    @torch.no_grad()
    def replay(
        self, *, input_ids: torch.Tensor, document_ids: torch.Tensor, num_speculative_tokens: int, **_: Any
    ) -> Iterator[torch.Tensor]:
        """Yields the draft logits [S, D] of each depth; see `Replays`.

        Depth j of row r is the prediction after token r + j, whatever the depth, so one forward gives all of them.
        """
        size = input_ids.shape[1]
        logits = torch.zeros(size + num_speculative_tokens, len(self.draft_to_target), device=input_ids.device)
        lengths = torch.unique_consecutive(document_ids[0], return_counts=True)[1].tolist()
        # Document by document: this model has no mask that would keep packed documents apart.
        for tokens, place in zip(torch.split(input_ids[0], lengths), torch.split(logits[:size], lengths), strict=True):
            place.copy_(self.logits(tokens))
        for depth in range(1, num_speculative_tokens + 1):
            yield logits[depth : depth + size]


@attrs.define(eq=False)
class _Sequence:
    """State of one decoded sequence.

    Attributes:
        tokens: [n] int64, verified.
        cache: keys of the first tokens; at least the last token has not been run yet.
        drafted: the last round's drafts; the cache has the keys of all but the last of them, behind those of `tokens`.
        mark: the running states before the drafts, if the model has any.
    """

    tokens: torch.Tensor
    cache: DynamicCache
    drafted: torch.Tensor
    mark: Mark = attrs.field(factory=list)


class DraftModelDrafter:
    """Drafts chains with one forward per token and a KV cache; samples from softmax(logits / T) at T > 0."""

    target_layer_ids: tuple[int, ...] = ()

    def __init__(self, model: DraftModel) -> None:
        self.model = model

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> _Sequence:
        """Starts a sequence; see `Drafter`."""
        cache = new_cache(self.model.model)
        self.model.logits(tokens[:-1], cache)
        return _Sequence(tokens, cache, tokens[:0])

    @torch.no_grad()
    def propose(
        self, state: _Sequence, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts `num_tokens` tokens; see `Drafter`."""
        model = self.model
        # After a rejection these are the verifier's token and accepted drafts without keys.
        unseen = state.tokens[state.cache.get_seq_length() :]
        tokens: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        for _ in range(num_tokens):
            logits = model.logits(unseen, state.cache)[-1]
            if model.recurrent and not tokens:
                # After the verified tokens and before the first draft is run.
                state.mark = mark(state.cache)
            if temperature == 0.0:
                unseen = logits.argmax(-1, keepdim=True)
            else:
                q = torch.softmax(logits / temperature, -1)
                unseen = torch.multinomial(q, 1, generator=generator)
                # q over the verifier's whole vocabulary, 0 beyond the draft model's rows.
                probs.append(torch.nn.functional.pad(q, (0, model.vocab_size - len(q))))
            tokens.append(unseen)
        state.drafted = torch.cat(tokens)
        return chain(state.drafted, torch.stack(probs) if probs else None)

    def advance(self, state: _Sequence, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds the tokens that a round emitted and drops the keys of rejected drafts; see `Drafter`."""
        common = min(len(tokens), len(state.drafted))
        # How many drafts were accepted: the common prefix of drafts and emitted tokens.
        same = (tokens[:common] == state.drafted[:common]).cumprod(0).sum()
        # Keys of rejected drafts, behind those of the verified tokens and of the accepted drafts.
        surplus = state.cache.get_seq_length() - len(state.tokens) - int(same)
        if surplus > 0 and self.model.recurrent:
            # The mark lies before all drafts, so the next round runs the accepted ones again.
            rewind(state.cache, state.mark)
        elif surplus > 0:
            state.cache.crop(-surplus)
        state.tokens = torch.cat([state.tokens, tokens])
