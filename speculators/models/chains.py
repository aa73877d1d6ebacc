"""What algorithms share that draft a chain: who predicts which place, how it is counted, and the recurrent unroll.

Row r pairs the verifier's state at place r with token r + 1. Depth k (from 0) reads token r + 1 + k at position r + k,
beside the state that depth k - 1 left, and drafts place r + 2 + k. Training, replay and live drafting are one
computation: the keys of depth 0 for all verified rows, and one key a depth of the row's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch
from torch import nn

from speculators.drafter import Proposal, chain
from speculators.errors import ContractError
from speculators.model import SpeculatorModel
from speculators.nn.attention import unrolled_attention
from speculators.nn.cache import AttendAt, KeysValues, PrefixCache
from speculators.nn.layout import RowLayout, Segment, on_host, rows_of
from speculators.nn.norm import RMSNorm
from speculators.verifier.weights import VerifierHead


def predicting_rows(layout: RowLayout, depths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which row predicts each supervised place at each depth, on the host.

    Returns:
        rows: [K, N] int64, place - 2 - k.
        valid: [K, N] bool, that row lies in the place's document; the others are set to row 0.
    """
    wanted = layout.places[None] - 2 - torch.arange(depths)[:, None]
    return wanted.clamp_min(0), wanted >= layout.place_starts[None]


def query_index(layout: RowLayout, segments: tuple[Segment, ...]) -> torch.Tensor:
    """Returns [S] int64 on the host: which of the query rows of `segments` each row is; 0 for a row that is none."""
    queries = rows_of(segments, torch.device("cpu"))
    index = torch.zeros(max(layout.size, 1), dtype=torch.int64)
    index[queries] = torch.arange(len(queries))
    return index


def chain_metrics(
    loss: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, size: int
) -> dict[str, torch.Tensor]:
    """Accuracy by depth: `accuracy_k` with all earlier depths of the same row right, `conditional_k` given that.

    Args:
        loss: of the row.
        right: [K, N] bool, the draft of place n at depth k is the verifier's.
        rows: [K, N] int64 below `size`, the row it was drafted from.
        valid: [K, N] bool, there is such a row.
        size: rows that can be told apart.
    """
    metrics = {"loss": loss.detach()}
    # A slot past the last row takes what is not to be marked: a boolean index would wait for the device.
    blank = torch.zeros(size + 1, dtype=torch.bool, device=right.device)
    reached = supervised = None
    for depth, (hit, row, ok) in enumerate(zip(right & valid, rows, valid, strict=True)):
        here, good = (blank.index_fill(0, torch.where(mark, row, size), True)[:size] for mark in (ok, hit))
        supervised = here if supervised is None else here & supervised
        before = supervised if reached is None else reached & supervised
        reached = good & before
        metrics[f"accuracy_{depth + 1}"] = reached.sum() / supervised.sum().clamp_min(1)
        metrics[f"conditional_{depth + 1}"] = reached.sum() / before.sum().clamp_min(1)
    return metrics


@on_host()
def drafted_places(layout: RowLayout, rows: torch.Tensor, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which of some drafts are of a supervised place in the document of their row; all on the host.

    Args:
        rows: [E] int64 that drafts are made from.
        depths: [E] int64 from 0; place row + 2 + depth is drafted.

    Returns:
        drafts: [M] int64, indices of those.
        place: [M] int64, which of the supervised places each drafts.
    """
    document = torch.full((layout.size + 1,), -1)
    for index, (start, stop) in enumerate(layout.documents):
        document[start:stop] = index
    supervised = torch.full((layout.size + 1,), -1)
    supervised[layout.places] = torch.arange(len(layout.places))
    target = (rows + 2 + depths).clamp_max(layout.size)
    drafts = torch.nonzero((supervised[target] >= 0) & (document[target] == document[rows]))[:, 0]
    return drafts, supervised[target[drafts]]


def drawn_metrics(
    loss: torch.Tensor, right: torch.Tensor, layout: RowLayout, depths: int, depth: torch.Tensor, place: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Accuracies as of `chain_metrics` over drafts that were drawn.

    Args:
        right: [M] bool, on the device.
        depths: K.
        depth: [M] int64 below K of each draft, on the host; `place` [M], which supervised place it drafts.
    """
    rows, valid, flat = _drawn_grid(layout, depths, depth, place)
    device = right.device
    flat = flat.to(device, non_blocking=True)
    hit = torch.zeros(valid.numel(), dtype=torch.bool, device=device).index_copy_(0, flat, right).view(valid.shape)
    rows, valid = rows.to(device, non_blocking=True), valid.to(device, non_blocking=True)
    return chain_metrics(loss, hit, rows, valid, layout.size)


@on_host()
def _drawn_grid(
    layout: RowLayout, depths: int, depth: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns rows and which are drawn, [K, N] each, and where in them the drafts stand, [M]; on the host."""
    rows, _ = predicting_rows(layout, depths)
    valid = torch.zeros(depths, len(layout.places), dtype=torch.bool)
    valid[depth, place] = True
    return rows, valid, depth * len(layout.places) + place


def pick(
    logits: torch.Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns a draft id [1], the likeliest at temperature 0 and sampled otherwise, and what it was drawn from [D]."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True), None
    q = torch.softmax(logits.float() / temperature, -1)
    return torch.multinomial(q, 1, generator=generator), q


def proposal_of(
    picks: list[tuple[torch.Tensor, torch.Tensor | None]], draft_to_target: torch.Tensor, vocab_size: int
) -> Proposal:
    """Returns the chain of what `pick` gave, depth by depth, in the verifier's vocabulary of `vocab_size`."""
    if not picks:
        return chain(torch.empty(0, dtype=torch.int64, device=draft_to_target.device))
    tokens = draft_to_target[torch.cat([token for token, _ in picks])]
    drawn = [q for _, q in picks if q is not None]
    if not drawn:
        return chain(tokens)
    probs = torch.zeros(len(drawn), vocab_size, device=tokens.device)
    return chain(tokens, probs.index_copy_(1, draft_to_target, torch.stack(drawn)))


def copy_norm(norm: RMSNorm, head: VerifierHead) -> None:
    """Makes `norm` the verifier's final norm.

    Raises:
        ContractError: the verifier's is of another kind.
    """
    if head.centered or head.eps != norm.eps:
        kind = "LayerNorm" if head.centered else f"RMSNorm with eps {head.eps}"
        raise ContractError(
            f"the verifier's final norm is a {kind}, the draft's an RMSNorm with eps {norm.eps}",
            hint="algorithms that read the normed last state need an RMSNorm; leave out algorithm.decoder.rms_norm_eps",
        )
    factor = head.norm_weight.float()
    norm.weight.data = 1 + factor if head.unit_offset else factor


class ChainModel(SpeculatorModel):
    """A draft model that reads a token embedding beside a state and leaves one for its head.

    Attributes:
        vocab_size: V of the verifier.
        draft_vocab_size: D.
        target_head: of the verifier, for training; None in a model that was loaded to draft.
        scale, window: of its attention.
    """

    lm_head: nn.Linear
    vocab_size: int
    draft_vocab_size: int
    target_head: VerifierHead | None
    scale: float
    window: int | None

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The verifier's states [S, A*H] -> the state [S, H] that depth 0 reads."""
        raise NotImplementedError

    def step(
        self,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: AttendAt,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs once: states [S, H] and tokens [S] -> states [S, H], or [R, H] where only `rows` are wanted."""
        raise NotImplementedError

    def logits(self, read: torch.Tensor) -> torch.Tensor:
        """[R, H] -> [R, D] float32."""
        return self.lm_head(read.to(self.lm_head.weight.dtype)).float()


class RecurrentModel(ChainModel):
    """A chain model whose state is the one that it left one depth before."""

    def read(self, state: torch.Tensor) -> torch.Tensor:
        """What a step left [R, H] -> what the head reads [R, H]."""
        return state

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
        """Yields for each depth the draft logits [S, D]; see `speculators.drafter.Replays`."""
        whole = RowLayout.of(document_ids, torch.zeros_like(document_ids, dtype=torch.bool))
        layout, kept, (states, tokens, positions) = whole.without_padding(
            hidden_states[0], input_ids[0], position_ids[0]
        )
        entered = self.enter(states)
        for read in unroll(self, entered, tokens, positions, layout, layout.whole(), num_speculative_tokens):
            logits = torch.zeros(whole.size, self.draft_vocab_size, device=input_ids.device)
            logits[kept] = self.logits(read)
            yield logits


def unroll(
    model: RecurrentModel,
    state: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    layout: RowLayout,
    segments: tuple[Segment, ...],
    depths: int,
) -> Iterator[torch.Tensor]:
    """Yields what the head reads [R, H] of the query rows of `segments` at each depth, teacher-forced.

    Args:
        state: [S, H], what depth 0 reads.
        tokens: [S] the row's own.
        positions: [S].
    """
    rows = rows_of(segments, tokens.device)
    prefix: list[KeysValues] = []
    own: list[list[KeysValues]] = [[] for _ in model.layers]
    last = len(tokens) - 1
    everything = torch.arange(layout.size, device=tokens.device)
    for depth in range(depths):

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, depth: int = depth) -> torch.Tensor:
            (own[index] if depth > 0 else prefix).append((k, v))
            # At depth 0 only the last layer may leave rows out: the one above needs all of them for its keys.
            covered = segments if depth > 0 or index == len(own) - 1 else layout.whole()
            return unrolled_attention(q, prefix[index], own[index], covered, scale=model.scale, window=model.window)

        source = everything if depth == 0 else rows
        read = tokens[(source + 1 + depth).clamp_max(last)]
        state = model.step(state, read, positions[source] + depth, attend, rows if depth == 0 else None)
        yield model.read(state)


@attrs.frozen(eq=False)
class Unrolled:
    """What the head reads where a supervised place is predicted.

    Attributes:
        states: [K, N, H].
        rows: [K, N] int64, the row that predicts, and `valid` [K, N] bool, whether there is one; on the device.
        places: [N] int64, on the device.
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
    """Unrolls the rows that reach a supervised place; arguments as `unroll`, without padding."""
    device = tokens.device
    segments = layout.reaching(2, depths + 1)
    rows, valid = predicting_rows(layout, depths)
    index = query_index(layout, segments)[rows].to(device, non_blocking=True)
    steps = unroll(model, state, tokens, positions, layout, segments, depths)
    # Without query rows there are no places either, and the (empty) sums keep every parameter in the graph.
    states = torch.stack([step.index_select(0, at) for step, at in zip(steps, index, strict=True)])
    moved = (tensor.to(device, non_blocking=True) for tensor in (rows, valid, layout.places))
    return Unrolled(states, *moved)


@attrs.define(eq=False)
class Verified:
    """State of one decoded sequence: the depth-0 keys of all verified rows, and what the last one left, [1, H]."""

    cache: PrefixCache
    state: torch.Tensor


class PrefixDrafter:
    """What drafters of chains do with verified tokens: run them at depth 0, and keep their keys.

    Args:
        model: in evaluation mode.
        target_layer_ids: of the verifier's states that it enters.
    """

    def __init__(self, model: ChainModel, target_layer_ids: tuple[int, ...]) -> None:
        self.model = model
        self.target_layer_ids = target_layer_ids
        self.draft_to_target = model.draft_to_target

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> Verified:
        """Takes in a prompt: tokens [n + 1], states [n, A*H]."""
        sequence = Verified(PrefixCache(), torch.empty(0))
        self.advance(sequence, tokens[1:], hidden_states)
        return sequence

    @torch.no_grad()
    def advance(self, state: Verified, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Takes in what a round emitted: tokens [m], states [m, A*H] of the places before them."""
        model = self.model
        positions = state.cache.extend(tokens)
        attend = state.cache.attend(scale=model.scale, window=model.window)
        state.state = model.step(model.enter(hidden_states), tokens, positions, attend, None)[-1:]


class ChainDrafter(PrefixDrafter):
    """Drafts chains with a recurrent model, round by round; see `Drafter`."""

    model: RecurrentModel

    @torch.no_grad()
    def propose(
        self, state: Verified, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`; greedy at temperature 0, sampled from softmax(logits / T) otherwise."""
        model, cache = self.model, state.cache
        last = cache.length - 1
        own: list[list[KeysValues]] = [[] for _ in model.layers]
        segments = (Segment(0, last, cache.length),)

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own[index].append((k, v))
            prefix = cache.layers[index]
            return unrolled_attention(q, prefix, own[index], segments, scale=model.scale, window=model.window)

        hidden = state.state
        position = torch.tensor([last], device=hidden.device)
        picks: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for depth in range(1, num_tokens + 1):
            picks.append(pick(model.logits(model.read(hidden))[0], temperature, generator))
            if depth < num_tokens:
                token = self.draft_to_target[picks[-1][0]]
                hidden = model.step(hidden, token, position + depth, attend, None)
        return proposal_of(picks, self.draft_to_target, model.vocab_size)


def depth_weights(weights: list[float], valid: torch.Tensor) -> torch.Tensor:
    """Returns [K, N]: the depth's weight over the number of supervised places, 0 where no row predicts the place."""
    by_depth = torch.tensor(weights).to(valid.device, non_blocking=True)
    return by_depth[:, None] * valid / max(valid.shape[1], 1)


def wanted_states(last: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Returns the verifier's states [N, H] that give its distributions of `places` [N]: those one place before."""
    return last[(places - 1).clamp_min(0)]
