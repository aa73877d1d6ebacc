"""Replays of a draft on the verifier's answers: as configured, and with one thing changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import attrs
import numpy as np
import torch

from speculators.bench.rows import Response
from speculators.bench.walk import walk
from speculators.doctor.answers import Answers
from speculators.doctor.parts import replaced
from speculators.doctor.speculator import ExaminedSpeculator
from speculators.drafter import Replays
from speculators.model import SpeculatorModel

# A misalignment already shows in the first draft, and each further depth costs as much again.
MOST_DEPTHS = 3


@attrs.frozen(eq=False)
class Trial:
    """The drafts of one replay and which of them were accepted.

    Attributes:
        tables: per answer, [L, K] of zeros and ones as in `bench.walk`.
        drafts: per answer, [L, K] int64, the drafted tokens.
        first: depth-1 logits of the first answer; they show whether the draft reads the changed input at all.
        ranks: per answer, [L], 1 / rank of the answer's token in the logits of the first draft, 0 if it cannot be
            drafted; () without logits. Unlike a probability, it does not depend on how sure the draft is.
    """

    tables: tuple[np.ndarray, ...]
    drafts: tuple[torch.Tensor, ...]
    first: torch.Tensor
    ranks: tuple[np.ndarray, ...] = ()

    def against(self, responses: Sequence[Response], labels: int) -> Trial:
        """Judges the same drafts against the tokens `labels` places later."""
        pairs = zip(responses, self.drafts, strict=True)
        tables = tuple(hits(response, drafts, labels) for response, drafts in pairs)
        return attrs.evolve(self, tables=tables, ranks=())

    def first_answers(self, count: int) -> Trial:
        """Restricts the trial to the first `count` answers."""
        return attrs.evolve(self, tables=self.tables[:count], drafts=self.drafts[:count], ranks=self.ranks[:count])

    @property
    def first_scores(self) -> np.ndarray:
        """Per place of all answers: the reciprocal rank for the first draft, or without ranks whether it hits."""
        return np.concatenate(self.ranks or [table[:, 0] for table in self.tables])

    @property
    def scores(self) -> list[np.ndarray]:
        """Per answer, [L]: `accepted`, with the reciprocal rank, if known, in place of the first draft."""
        if not self.ranks:
            return self.accepted
        parts = zip(self.accepted, self.tables, self.ranks, strict=True)
        return [accepted - table[:, 0] + rank for accepted, table, rank in parts]

    @property
    def tau(self) -> float:
        """Acceptance length, in tokens per round."""
        return walk(self.tables, self.tables[0].shape[1]).tau

    @property
    def accepted(self) -> list[np.ndarray]:
        """Per answer, [L]: drafts accepted by a round that starts at each place."""
        return [table.cumprod(axis=1).sum(axis=1) for table in self.tables]

    @property
    def mean(self) -> float:
        """Mean number of accepted drafts per place."""
        return float(np.concatenate(self.accepted).mean())

    @property
    def hits(self) -> float:
        """Share of places where the first draft is accepted."""
        return float(np.concatenate([table[:, 0] for table in self.tables]).mean())


@attrs.frozen(kw_only=True)
class Shift:
    """An offset to apply in a trial.

    Attributes:
        tokens: reads the token this many places later beside each state.
        positions: moves the answer's position ids by this much, and leaves the prompt's.
    """

    tokens: int = 0
    positions: int = 0


@torch.no_grad()
def attempt(
    model: Replays,
    responses: Sequence[Response],
    states: Sequence[torch.Tensor],
    k: int,
    shift: Shift = Shift(),  # frozen
) -> Trial:
    """Replays a draft on the verifier's greedy answers.

    Args:
        model: the draft model.
        responses: the answers.
        states: per answer, [n, A*H] in the model's dtype.
        k: number of depths.
        shift: the offset to apply.
    """
    device = model.draft_to_target.device
    drafted: list[torch.Tensor] = []
    ranks: list[np.ndarray] = []
    first = torch.empty(0)
    for response, state in zip(responses, states, strict=True):
        size, rounds = len(response.tokens), len(response.answer) - 1
        # Row r drafts place r + 2 first, so these rows draft the answer from its second token on.
        rows = torch.arange(size - 2 - rounds, size - 2, device=device)  # [L]
        depths = model.replay(**_batch(response, state, shift, device), num_speculative_tokens=k)
        drafts: list[torch.Tensor] = []
        for logits in depths:
            chosen = logits[rows]  # [L, D]
            if not drafts:
                ranks.append(reciprocal_ranks(chosen, torch.tensor(response.answer[1:]), model.draft_to_target))
            drafts.append(model.draft_to_target[chosen.argmax(-1)].cpu())
            if not len(first):
                first = chosen.float().cpu()
        drafted.append(torch.stack(drafts, dim=1))  # [L, K]
    tables = tuple(hits(response, drafts, 0) for response, drafts in zip(responses, drafted, strict=True))
    return Trial(tables, tuple(drafted), first, tuple(ranks))


def reciprocal_ranks(logits: torch.Tensor, tokens: torch.Tensor, draft_to_target: torch.Tensor) -> np.ndarray:
    """Computes 1 / rank of each token in its row of logits [L, D]; 0 for tokens [L] outside the draft vocabulary."""
    ids, order = draft_to_target.sort()
    tokens = tokens.to(ids.device)
    place = torch.searchsorted(ids, tokens).clamp_max(len(ids) - 1)
    own = logits.gather(1, order[place][:, None])
    # Equal logits share their mean rank: a dead head must not look perfect.
    ranks = ((logits > own).sum(1) + 1 + (logits >= own).sum(1)) / 2
    drafted = (ids[place] == tokens) & ~own[:, 0].isnan()
    return torch.where(drafted, 1 / ranks, torch.zeros(())).cpu().numpy()


def hits(response: Response, drafts: torch.Tensor, labels: int) -> np.ndarray:
    """Marks the drafts that equal the answer's tokens, [L, K]; anchor i drafts tokens i + 1 .. i + K of the answer."""
    answer = torch.tensor(response.answer)
    place = 1 + torch.arange(drafts.shape[0])[:, None] + torch.arange(drafts.shape[1]) + labels
    right = drafts == answer[place.clamp_max(len(answer) - 1)]
    return (right & (place < len(answer))).float().numpy()


def _batch(response: Response, states: torch.Tensor, shift: Shift, device: torch.device) -> dict[str, torch.Tensor]:
    tokens = torch.tensor(response.tokens)
    size = len(tokens)
    positions = torch.arange(size)
    positions[response.prompt_length :] += shift.positions
    read = tokens[(torch.arange(size) + shift.tokens).clamp(0, size - 1)]
    return {
        "hidden_states": states.to(device)[None],
        "input_ids": read.to(device)[None],
        "position_ids": positions.to(device)[None],
        "document_ids": torch.zeros(1, size, dtype=torch.int64, device=device),
    }


@attrs.define(eq=False)
class DraftTrials:
    """Replays one speculator on one set of answers.

    Attributes:
        count: number of answers to use, the first ones; None for all.
        depths: most drafts per place.
    """

    speculator: ExaminedSpeculator
    answers: Answers
    count: int | None = None
    depths: int = MOST_DEPTHS

    def sample(self, count: int) -> DraftTrials:
        """Restricts the trials to the first draft of the first answers, which costs a fraction of a full replay."""
        return DraftTrials(self.speculator, self.answers, count, 1)

    @cached_property
    def configured(self) -> Trial:
        """The trial of the configured alignment, the reference for all others."""
        return self.attempt()

    @cached_property
    def own_states(self) -> list[torch.Tensor]:
        """The states of the configured layers, per answer."""
        return self.answers.states(self.speculator.layer_ids or (), self.count)

    @property
    def responses(self) -> list[Response]:
        """The answers, in the order of the trials' tables."""
        return [row.response for row in self.answers.rows[: self.count]]

    @property
    def k(self) -> int:
        """Number of depths to replay: as many as a server drafts, up to `depths`."""
        return min(self.speculator.num_tokens, self.depths)

    @property
    def model(self) -> SpeculatorModel:
        """The draft model, which must have loaded."""
        assert self.speculator.model is not None
        return self.speculator.model

    def attempt(self, shift: Shift = Shift(), states: Sequence[torch.Tensor] | None = None) -> Trial:
        """Replays the model with an offset, or on other states."""
        return self.attempt_with(self.model, shift, states)

    def attempt_on(self, layer_ids: Sequence[int]) -> Trial:
        """Replays the model on the states of other layers."""
        # Concatenated only when tried: all variants at once would take many times the memory.
        return self.attempt(states=self.answers.states(layer_ids, self.count))

    def attempt_weights(self, values: Mapping[str, torch.Tensor]) -> Trial:
        """Replays the model with other values of some of its tensors."""
        with replaced(self.model, values):
            return self.attempt()

    def attempt_with(
        self,
        model: SpeculatorModel,
        shift: Shift = Shift(),
        states: Sequence[torch.Tensor] | None = None,
    ) -> Trial:
        """Replays another model of the same algorithm."""
        states = self.own_states if states is None else states
        return attempt(model, self.responses, states[: self.count], self.k, shift)
