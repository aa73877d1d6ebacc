"""Drafting a block at once (arXiv 2602.06036): slots behind an anchor, and the verifier's states in every layer.

The anchor is a token that is known while its verifier state is not: place r + 1, where the states are known up to row
r. Slot 0 reads it, the other slots read the mask token; slot s stands at position r + 1 + s. All slots see the context
(the verifier's fused states up to row r, as keys and values of every layer) and their own block. Depth k (from 0)
drafts place r + 2 + k: in slot k + 1, or in slot k if every slot drafts the token after its own (`sample_from_anchor`).

Training runs whole blocks. A round that drafts K tokens runs only the slots that draft them, as servers do (vLLM: 1 +
K): where slots see each other, a draft depends on K.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import attrs
import torch
from torch import nn

from speculators.chunks import CHUNKS
from speculators.config import SpeculatorModelConfig
from speculators.facts import VerifierFacts
from speculators.losses import Weigh
from speculators.models.base_components import DecoderLayer, HeadedModel, Shape, take_over
from speculators.models.places import drafted_places, until_failure, wanted_states
from speculators.nn.block import Blocks, block_attention
from speculators.nn.cache import KeyBuffer, KeysValues
from speculators.nn.layout import PackedRow, RowLayout, on_host, rows_of
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import CosSin
from speculators.nn.vocab import mask_token
from speculators.verifier.weights import load_embeddings, load_head

Model = TypeVar("Model", bound="BlockDraftModel")
ContextOf = Callable[[int], KeysValues]


@attrs.frozen(eq=False)
class Drawn:
    """The drafts of a training row that a loss is computed for.

    Attributes:
        layout: of the row without padding.
        anchors: [G] int64 on the host, the rows r of the blocks; a block's anchor token is at place r + 1.
        block: [M] int64 on the host, the block of each draft.
        depth: [M] int64 on the host, from 0.
        place: [M] int64 on the host, index of the supervised place that each predicts.
        scale: factor by which the drawn blocks stand for all candidates, divided by the number of supervised places.
        states: [G, K, H] normed, of all slots that draft.
        drafts: [M] int64, index of each draft among the G * K slots.
        target_states: [M, H], the verifier's states that give its distributions of the drafted places.
        previous: [G, K] int64, the token before the one that each slot drafts.
    """

    layout: RowLayout
    anchors: torch.Tensor
    block: torch.Tensor
    depth: torch.Tensor
    place: torch.Tensor
    scale: float
    states: torch.Tensor
    drafts: torch.Tensor
    target_states: torch.Tensor
    previous: torch.Tensor

    def of_drafts(self, values: torch.Tensor) -> torch.Tensor:
        """Picks the drafts from values of all slots: [G, K, ...] -> [M, ...]."""
        return values.flatten(0, 1).index_select(0, self.drafts)

    def until_failure(self, weights: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Keeps the weights [M] of drafts up to and including their block's first wrong one, and sets the others to 0.

        Args:
            right: [M] bool, which drafts are right; see `places.until_failure`.
        """
        blocks, depths, _ = self.states.shape
        block, depth = (index.to(right.device, non_blocking=True) for index in (self.block, self.depth))
        return weights * until_failure(right, block, depth, rows=blocks, depths=depths)

    def weigh_until_failure(self, weights: torch.Tensor) -> Weigh:
        """Does so for `head_loss`, which finds out which drafts are right."""
        return lambda right, _: self.until_failure(weights, right[0])[None]


class BlockDraftModel(HeadedModel):
    """The backbone of a block drafter.

    Args:
        config: complete, as in config.json; has `block_size`, `mask_token_id`, `sample_from_anchor`,
            `sliding_window_non_causal` and `aux_hidden_state_layer_ids`.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]]

    def __init__(self, config: Any) -> None:
        decoder = config.transformer_layer_config
        config = attrs.evolve(config, mask_token_id=mask_token(config.mask_token_id, decoder))
        super().__init__(config)
        shape = Shape.of(decoder)
        size, eps = shape.hidden_size, shape.rms_norm_eps
        # The context is the same in every layer; each layer projects it to its own keys and values.
        self.add_embeddings()
        self.fc = nn.Linear(self.num_states * size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList([DecoderLayer(shape) for _ in range(decoder["num_hidden_layers"])])
        self.norm = RMSNorm(size, eps)
        self.add_head()
        if self.window is not None:
            # The anchor is the newest of the window's W places; the context holds the others.
            self.window = max(1, self.window - 1)
        # A server takes the embeddings from the verifier, and also the head unless it is cut to a draft vocabulary.
        shared = ("lm_head.",) if self.draft_vocab_size == self.vocab_size else ()
        self.not_saved = ("embed_tokens.", "target_head.", "rotary.", *shared)

    @classmethod
    def from_training_args(cls: type[Model], verifier_config: VerifierFacts, **kwargs: Any) -> Model:
        """Builds the model with the verifier's embeddings and head rows; see `take_over`."""
        ids = tuple(kwargs["target_layer_ids"])
        model = cls(cls.config_class.pick({**kwargs, "aux_hidden_state_layer_ids": ids}))
        take_over(model, verifier_config, kwargs)
        return model

    @property
    def depths(self) -> int:
        """Tokens that a block drafts."""
        return int(self.config.block_size) - self.first_slot

    @property
    def first_slot(self) -> int:
        """The slot that drafts at depth 0."""
        return 0 if self.config.sample_from_anchor else 1

    @property
    def shaped_by_k(self) -> bool:
        """Whether a draft depends on how many are drafted: slots see those behind them."""
        return bool(self.config.sliding_window_non_causal)

    @property
    def num_states(self) -> int:
        """Number of the verifier's states that are fused (A)."""
        return len(self.config.aux_hidden_state_layer_ids)

    def slots(self, num_tokens: int) -> int:
        """Counts the slots that a round of `num_tokens` drafts runs, at most a block."""
        return self.first_slot + min(num_tokens, self.depths)

    def share_verifier(self, folder: Path) -> None:
        """Takes the embeddings, and a head over the whole vocabulary, from the verifier's folder."""
        dtype = self.fc.weight.dtype
        self.embed_tokens.weight.data = load_embeddings(folder).to(dtype)
        if "lm_head." in self.not_saved:
            head = load_head(folder, VerifierFacts.read(folder / "config.json"), dtype=dtype)
            self.lm_head.weight.data = head.weight

    def draw(self, row: PackedRow, fused: torch.Tensor, last: torch.Tensor, *, max_anchors: int) -> Drawn:
        """Draws anchors of a packed row, runs their blocks, and picks the slots that draft a supervised place.

        Uses torch's global generator, which training seeds for each row of each step.

        Args:
            fused: [S, A*H], the auxiliary states of the row's places.
            last: [S, H], their last states.
            max_anchors: blocks to draw at most.
        """
        layout, tokens = row.layout, row.tokens
        device = tokens.device
        # Index arithmetic on the host; the device only receives the results.
        chosen = _choose(layout, self.depths, max_anchors)
        normed = self.run(fused, tokens, row.positions, chosen.anchors, layout.documents, slots=self.config.block_size)
        return Drawn(
            layout=layout,
            anchors=chosen.anchors,
            block=chosen.block,
            depth=chosen.depth,
            place=chosen.place,
            scale=chosen.scale,
            states=normed[:, self.first_slot :],
            drafts=chosen.drafts.to(device, non_blocking=True),
            target_states=wanted_states(last, chosen.targets.to(device, non_blocking=True)),
            previous=tokens[chosen.previous.to(device, non_blocking=True)],
        )

    def run(
        self,
        hidden_states: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        anchors: torch.Tensor,
        documents: tuple[tuple[int, int], ...],
        *,
        slots: int,
    ) -> torch.Tensor:
        """Computes the normed states [G, slots, H] of the blocks of `anchors`.

        Args:
            hidden_states: [S, A*H].
            tokens: [S].
            positions: [S].
            anchors: [G] int64 on the host, ascending rows, none the last of its document.
            documents: (start, stop) of each.
        """
        # Keys of the context are rotated at the positions of their own rows.
        context, cos_sin = self.fuse(hidden_states), self.rotary(positions)
        blocks = blocks_at(anchors, slots, documents)
        places = anchors.to(tokens.device, non_blocking=True) + 1

        def context_of(index: int) -> KeysValues:
            return cast(DecoderLayer, self.layers[index]).self_attn.keys_values(context, cos_sin)

        return self.decode_blocks(tokens[places], positions[places], blocks, context_of, slots=slots)

    def fuse(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Fuses the auxiliary states to the context: [S, A*H] -> [S, H]."""
        return self.hidden_norm(self.fc(hidden_states.to(self.fc.weight.dtype)))

    def decode_blocks(
        self, anchors: torch.Tensor, positions: torch.Tensor, blocks: Blocks, context_of: ContextOf, *, slots: int
    ) -> torch.Tensor:
        """Runs the layers over blocks.

        Args:
            anchors: [G] int64, anchor tokens.
            positions: [G], theirs.
            context_of: gives the context's keys and values in layer `index`; called while that layer runs, since only
                then are its sharded weights gathered.
            slots: of each block.

        Returns:
            [G, slots, H] normed.
        """
        places = torch.arange(slots, device=anchors.device)
        # Slot 0 reads the anchor, the others the mask token.
        tokens = torch.where(places == 0, anchors[:, None], self.config.mask_token_id)  # [G, slots]
        cos_sin: CosSin = self.rotary((positions[:, None] + places).flatten())
        state = self.embed_tokens(tokens.flatten()).to(self.fc.weight.dtype)  # [G * slots, H]
        causal = not self.config.sliding_window_non_causal
        for index, layer in enumerate(self.layers):

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: int = index) -> torch.Tensor:
                return block_attention(
                    q, context_of(index), (k, v), blocks, scale=self.scale, window=self.window, causal=causal
                )

            state = layer(state, cos_sin, attend)
        return self.norm(state).unflatten(0, (-1, slots))

    @torch.no_grad()
    def replay(self, **batch: Any) -> Iterator[torch.Tensor]:
        """Yields the draft logits [S, D] of each depth, at most a block's; see `speculators.drafter.Replays`."""
        states = self.replay_states(**batch).to(self.fc.weight.dtype)
        yield from self.depth_logits(states, batch["input_ids"][0])

    def depth_logits(self, states: torch.Tensor, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the draft logits [S, D] of each depth, in float32.

        Args:
            states: [S, K, H] of all rows' drafts.
            tokens: [S], the row's own, which a later slot may depend on.
        """
        for depth in range(states.shape[1]):
            yield self.logits(states[:, depth])

    @torch.no_grad()
    def replay_states(self, *, hidden_states: torch.Tensor, num_speculative_tokens: int, **batch: Any) -> torch.Tensor:
        """Computes the normed states [S, K, H] of all rows' drafts, at most a block's; 0 for rows without an anchor.

        Args:
            hidden_states: [1, S, A*H]; the rest of the batch as `forward` receives it.
        """
        row = PackedRow.of(**batch)
        fused, documents = row.cut(hidden_states), row.layout.documents
        # The anchor token is at r + 1, so the last row of a document starts no block.
        rows = [torch.arange(start, stop - 1) for start, stop in documents]
        anchors = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        slots = self.slots(num_speculative_tokens)
        width = fused.shape[1] // self.num_states
        states = torch.zeros(row.padded_size, slots - self.first_slot, width, device=row.tokens.device)
        for part in torch.split(anchors, CHUNKS[row.tokens.device.type].replay_blocks):
            normed = self.run(fused, row.tokens, row.positions, part, documents, slots=slots)
            states[row.kept[part.to(row.kept.device)]] = normed[:, self.first_slot :].float()
        return states


@attrs.frozen(eq=False)
class _Chosen:
    """The host's part of `Drawn`, with places instead of states and tokens.

    Attributes:
        targets: [M] int64, the drafted places.
        previous: [G, K] int64, the places before each slot's token.
    """

    anchors: torch.Tensor
    drafts: torch.Tensor
    block: torch.Tensor
    depth: torch.Tensor
    place: torch.Tensor
    targets: torch.Tensor
    previous: torch.Tensor
    scale: float


@on_host()
def _choose(layout: RowLayout, depths: int, max_anchors: int) -> _Chosen:
    # Rows with a supervised place among the `depths` that their block drafts.
    candidates = rows_of(layout.reaching(2, depths + 1), torch.device("cpu"))
    anchors = candidates[torch.randperm(len(candidates))[:max_anchors].sort().values]
    rows, depth = (x.flatten() for x in torch.meshgrid(anchors, torch.arange(depths), indexing="ij"))
    # A block may reach past its document or over unsupervised places: those slots get no loss.
    drafts, place = drafted_places(layout, rows, depth)
    return _Chosen(
        anchors=anchors,
        drafts=drafts,
        block=drafts // depths,
        depth=depth[drafts],
        place=place,
        targets=layout.places[place],
        previous=(anchors[:, None] + 1 + torch.arange(depths)).clamp_max(max(0, layout.size - 1)),
        # Mean over supervised places, times the share of blocks that was drawn.
        scale=len(candidates) / max(1, len(anchors)) / max(1, len(layout.places)),
    )


@on_host()
def blocks_at(anchors: torch.Tensor, slots: int, documents: tuple[tuple[int, int], ...]) -> Blocks:
    """Lays out the attention of the blocks of `anchors` [G]; the anchor token, one place on, ends their context."""
    places = anchors + 1
    return Blocks.of(places, torch.full_like(places, slots), places, documents)


def decay_weights(drawn: Drawn, depths: int, gamma: float | None) -> torch.Tensor:
    """Weighs each draft by exp(-depth / gamma), divided by the sum over a whole block; [M].

    Args:
        depths: that a block drafts.
        gamma: None takes the paper's 7 for a block of 16 that drafts 15, in proportion to depths + 1.
    """
    decay = torch.exp(-torch.arange(depths) / (gamma or 7 * (depths + 1) / 16))
    return (decay / decay.sum())[drawn.depth].to(drawn.states.device, non_blocking=True)


@attrs.define(eq=False)
class BlockSequence:
    """State of one decoded sequence.

    Attributes:
        cache: the context's keys and values in each layer.
        anchor: [1] int64, the last token.
    """

    cache: KeyBuffer
    anchor: torch.Tensor


class BlockDrafter:
    """Caches the context's keys, and runs the block of a round, as every drafter of a block model does."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.target_layer_ids = tuple(model.config.aux_hidden_state_layer_ids)
        self.draft_to_target = model.draft_to_target

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> BlockSequence:
        """Starts a sequence from a prompt: tokens [n + 1], states [n, A*H]."""
        sequence = BlockSequence(KeyBuffer(), tokens[-1:])
        self.advance(sequence, tokens[1:], hidden_states)
        return sequence

    @torch.no_grad()
    def advance(self, state: BlockSequence, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Adds the tokens [m] that a round emitted, with the verifier's states [m, A*H] of the places before them."""
        # The last emitted token has no verifier state yet: it is the next round's anchor.
        model, state.anchor = self.model, tokens[-1:]
        cos_sin = model.rotary(state.cache.extend(tokens))
        context = model.fuse(hidden_states)  # [m, H]
        for index, layer in enumerate(model.layers):
            k, v = layer.self_attn.keys_values(context, cos_sin)
            state.cache.write(index, k, v, state.cache.length - len(tokens))

    def block(self, state: BlockSequence, num_tokens: int) -> torch.Tensor:
        """Computes the normed states [K, H] of the drafts after the last token, K at most what a block drafts."""
        model, cache = self.model, state.cache
        last = torch.tensor([cache.length - 1])
        slots = model.slots(num_tokens)
        blocks = blocks_at(last, slots, ((0, cache.length + 1),))
        position = last.to(state.anchor.device) + 1
        normed = model.decode_blocks(state.anchor, position, blocks, cache.read, slots=slots)
        return normed[0, model.first_slot :]
