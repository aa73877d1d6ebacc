"""Drafting a chain: the recurrent unroll in training and replay, and the drafters that decode with it.

Row r pairs the verifier's state at place r with token r + 1. Depth k (from 0) reads token r + 1 + k at position r + k,
beside the state that depth k - 1 left, and drafts place r + 2 + k. Training, replay and live drafting are the same
computation: every depth attends to the depth-0 keys of the verified rows and to one key per later depth of its own row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import attrs
import torch

from speculators.drafter import Proposal, chain
from speculators.errors import ContractError
from speculators.losses import Weigh
from speculators.models.base_components import HeadedModel, for_few_rows
from speculators.models.branches import RecurrentBranches
from speculators.models.places import (
    chain_metrics,
    depth_weights,
    drafted_places,
    drawn_metrics,
    predicting_rows,
    query_index,
    until_failure,
    wanted_states,
)
from speculators.models.walk import responses_of, walk_weights
from speculators.nn.attention import unrolled_attention
from speculators.nn.cache import AttendAt, KeyBuffer, KeysValues
from speculators.nn.layout import PackedRow, RowLayout, Segment, rows_of
from speculators.nn.norm import RMSNorm
from speculators.verifier.weights import VerifierHead

# What plug-ins import from here, also where it is defined in `places`.
__all__ = [
    "ChainDrafter",
    "ChainModel",
    "PrefixDrafter",
    "RecurrentModel",
    "Unrolled",
    "Verified",
    "chain_metrics",
    "copy_norm",
    "depth_weights",
    "drafted_places",
    "drawn_metrics",
    "pick",
    "predicting_rows",
    "proposal_of",
    "query_index",
    "unroll",
    "unroll_to_places",
    "wanted_states",
]


def copy_norm(norm: RMSNorm, head: VerifierHead) -> None:
    """Makes `norm` the verifier's final norm.

    Raises:
        ContractError: the verifier's is not an RMSNorm, or has another eps.
    """
    if head.centered or head.eps != norm.eps:
        kind = "LayerNorm" if head.centered else f"RMSNorm with eps {head.eps}"
        raise ContractError(
            f"the verifier's final norm is a {kind}, the draft's an RMSNorm with eps {norm.eps}",
            hint="algorithms that read the normed last state need an RMSNorm; leave out algorithm.decoder.rms_norm_eps",
        )
    factor = head.norm_weight.float()
    # Gemma and Qwen3-Next save w of x * (1 + w).
    norm.weight.data = 1 + factor if head.unit_offset else factor


def pick(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Chooses a draft id from logits [D]: the most likely at temperature 0, else one sampled from softmax(logits / T).

    Returns:
        The id, [1] int64, and the distribution it was drawn from, [D] float32; None at temperature 0.
    """
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True), None
    q = torch.softmax(logits.float() / temperature, -1)
    return torch.multinomial(q, 1, generator=generator), q


def proposal_of(
    picks: list[tuple[torch.Tensor, torch.Tensor | None]], draft_to_target: torch.Tensor, vocab_size: int
) -> Proposal:
    """Chains the results of `pick`, depth by depth, in the verifier's vocabulary of `vocab_size` tokens."""
    if not picks:
        return chain(torch.empty(0, dtype=torch.int64, device=draft_to_target.device))
    tokens = draft_to_target[torch.cat([token for token, _ in picks])]
    drawn = [q for _, q in picks if q is not None]
    if not drawn:
        return chain(tokens)
    # Verification compares q with p over all V tokens; those outside the draft vocabulary have q = 0.
    probs = torch.zeros(len(drawn), vocab_size, device=tokens.device)
    return chain(tokens, probs.index_copy_(1, draft_to_target, torch.stack(drawn)))


class ChainModel(HeadedModel):
    """A draft model that reads a token embedding beside a state and leaves a state for its head."""

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps the verifier's states [S, A*H] to the state [S, H] that depth 0 reads."""
        raise NotImplementedError

    def step(
        self,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: AttendAt,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs one depth: states [S, H] and tokens [S] -> states [S, H], or [R, H] for the given `rows` only."""
        raise NotImplementedError

    def depths(self, row: PackedRow, hidden_states: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Yields what the head reads of all rows, [S, H], at each of `count` depths, given the row's own tokens.

        Args:
            hidden_states: [S, A*H] of the row's places.
        """
        raise NotImplementedError

    @torch.no_grad()
    def replay(
        self, *, hidden_states: torch.Tensor, num_speculative_tokens: int, **batch: Any
    ) -> Iterator[torch.Tensor]:
        """Yields the draft logits [S', D] of each depth, 0 at padding; see `speculators.drafter.Replays`."""
        row = PackedRow.of(**batch)
        for read in self.depths(row, row.cut(hidden_states), num_speculative_tokens):
            yield row.padded(self.logits(read))


class RecurrentModel(ChainModel):
    """A chain model whose depths each read the state that the depth before left."""

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """Maps a step's output [R, H] to the head's input [R, H]."""
        return state

    def depths(self, row: PackedRow, hidden_states: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Unrolls all rows; see `ChainModel`."""
        layout = row.layout
        yield from unroll(self, self.enter(hidden_states), row.tokens, row.positions, layout, layout.whole(), count)


def unroll(
    model: RecurrentModel,
    state: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    layout: RowLayout,
    segments: tuple[Segment, ...],
    depths: int,
) -> Iterator[torch.Tensor]:
    """Yields what the head reads, [R, H], of the query rows of `segments` at each depth, teacher-forced.

    Args:
        state: [S, H], what depth 0 reads.
        tokens: [S], the row's own.
        positions: [S].
    """
    rows = rows_of(segments, tokens.device)
    prefix: list[KeysValues] = []
    own: list[list[KeysValues]] = [[] for _ in model.layers]
    last = len(tokens) - 1
    everything = torch.arange(layout.size, device=tokens.device)
    for depth in range(depths):

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, depth: int = depth) -> torch.Tensor:
            # prefix[i] are layer i's depth-0 keys; own[i] grows by one pair of keys per depth.
            (own[index] if depth > 0 else prefix).append((k, v))
            # At depth 0 only the last layer may skip rows: each one below it gives the next layer all of its keys.
            covered = segments if depth > 0 or index == len(own) - 1 else layout.whole()
            return unrolled_attention(q, prefix[index], own[index], covered, scale=model.scale, window=model.window)

        # Depth 0 computes keys for all S rows; later depths only continue the R query rows.
        source = everything if depth == 0 else rows
        # Rows near the end of the row read its last token again; no supervised place depends on what they draft.
        read = tokens[(source + 1 + depth).clamp_max(last)]
        state = model.step(state, read, positions[source] + depth, attend, rows if depth == 0 else None)
        yield model.read(state)


@attrs.frozen(eq=False)
class Unrolled:
    """What the head reads to predict each of N supervised places at K depths.

    Attributes:
        states: [K, N, H].
        rows: [K, N] int64, the row that predicts.
        valid: [K, N] bool, whether there is such a row.
        places: [N] int64; all on the device.
    """

    states: torch.Tensor
    rows: torch.Tensor
    valid: torch.Tensor
    places: torch.Tensor


def unroll_to_places(
    model: RecurrentModel,
    state: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    layout: RowLayout,
    depths: int,
) -> Unrolled:
    """Unrolls the rows that reach a supervised place, and gathers their states by place; arguments as of `unroll`."""
    device = tokens.device
    segments = layout.reaching(2, depths + 1)
    rows, valid = predicting_rows(layout, depths)
    index = query_index(layout, segments)[rows].to(device, non_blocking=True)
    steps = unroll(model, state, tokens, positions, layout, segments, depths)
    # Without query rows there are no places either, and the (empty) sums keep every parameter in the graph.
    states = torch.stack([step.index_select(0, at) for step, at in zip(steps, index, strict=True)])
    moved = (tensor.to(device, non_blocking=True) for tensor in (rows, valid, layout.places))
    return Unrolled(states, *moved)


def weigh_drafts(
    weights: torch.Tensor, unrolled: Unrolled, layout: RowLayout, *, walk: bool, failure: bool
) -> torch.Tensor | Weigh:
    """Makes weights for `head_loss` that depend on what a round would do with the drafts.

    Args:
        weights: [K, N] to begin with; they stay as they are if neither option is on.
        walk: multiply by the rounds that a draft saves (`walk_weights`); `head_loss` must measure the acceptance.
        failure: set to 0 behind the first wrong draft of a row (`until_failure`).
    """
    if not (walk or failure):
        return weights
    depths, count = weights.shape
    # Drafts without a row would overwrite those of row 0, so they go to a row past the last.
    row = torch.where(unrolled.valid, unrolled.rows, layout.size).flatten()
    depth = torch.arange(depths, device=row.device).repeat_interleave(count)
    responses = responses_of(layout).to(row.device, non_blocking=True)

    def weigh(right: torch.Tensor, accepted: torch.Tensor) -> torch.Tensor:
        chosen = weights
        if walk:
            chosen = chosen * walk_weights(accepted, unrolled.valid, responses)
        if failure:
            kept = until_failure(right.flatten(), row, depth, rows=layout.size + 1, depths=depths)
            chosen = chosen * kept.view(depths, count)
        return chosen

    return weigh


@attrs.define(eq=False)
class Verified:
    """State of one decoded sequence.

    Attributes:
        cache: depth-0 keys and values of all verified rows; behind them, in a round, those of its drafts.
        state: [1, H], what depth 0 left at the last of them.
    """

    cache: KeyBuffer
    state: torch.Tensor


class PrefixDrafter:
    """Runs verified tokens at depth 0 and keeps their keys, as every drafter of chains does.

    Args:
        model: in evaluation mode.
        target_layer_ids: of the verifier's states that it enters.
    """

    def __init__(self, model: ChainModel, target_layer_ids: tuple[int, ...]) -> None:
        self._model = model
        self.target_layer_ids = target_layer_ids
        self.draft_to_target = model.draft_to_target

    @cached_property
    def model(self) -> Any:
        """The model in its form for few rows, made when a sequence begins."""
        return for_few_rows(self._model)

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> Verified:
        """Starts a sequence from a prompt: tokens [n + 1], states [n, A*H]."""
        sequence = Verified(KeyBuffer(), torch.empty(0))
        self.advance(sequence, tokens[1:], hidden_states)
        return sequence

    @torch.no_grad()
    def advance(self, state: Verified, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds the tokens [m] that a round emitted, with the verifier's states [m, A*H] of the places before them."""
        model: ChainModel = self.model
        positions = state.cache.extend(tokens)
        attend = state.cache.attend_newest(scale=model.scale, window=model.window)
        # Live, each verified row runs depth 0 once; only the last one's state starts the next round.
        state.state = model.step(model.enter(hidden_states), tokens, positions, attend, None)[-1:]


class ChainDrafter(PrefixDrafter):
    """Drafts chains with a recurrent model, one step per token; see `Drafter`."""

    @torch.no_grad()
    def propose(
        self, state: Verified, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`; see `pick` for the temperature."""
        model: RecurrentModel = self.model
        cache = state.cache
        # What depth 0 left is known already, so K drafts take K - 1 steps.
        hidden = state.state
        # Depth k of the last row stands at its position plus k, as in training.
        position = torch.tensor([cache.length - 1], device=hidden.device)
        picks: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for depth in range(1, num_tokens + 1):
            picks.append(pick(model.logits(model.read(hidden))[0], temperature, generator))
            if depth < num_tokens:
                token = self.draft_to_target[picks[-1][0]]
                # The drafts' keys are this round's only: the next one's verified rows overwrite them.
                attend = cache.attend_draft(depth, scale=model.scale, window=model.window)
                hidden = model.step(hidden, token, position + depth, attend, None)
        return proposal_of(picks, self.draft_to_target, model.vocab_size)

    def begin_tree(self, state: Verified, num_levels: int) -> RecurrentBranches:
        """Starts a tree, which takes a step per level; see `DraftsTrees`."""
        return RecurrentBranches(self.model, state.cache, state.state)
