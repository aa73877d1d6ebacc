"""P-EAGLE (arXiv 2602.01469): EAGLE-3's decoder, with all depths of a round in one forward.

Element (a, d) is row a at depth d. Depth 0 pairs the verifier's state at place a with token x_{a+1}; deeper ones know
neither and take a learnt state and the mask token's embedding instead. At rotary position a + d it drafts x_{a+2+d},
and sees the depth-0 keys of its document up to a, and those of its own row up to its own depth. Training draws which
rows have how many depths; replay and live decoding have all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import nn

from speculators.drafter import Proposal
from speculators.facts import VerifierFacts
from speculators.losses import head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.base_components import DecoderLayer, Shape, run_layers, take_over
from speculators.models.chains import (
    ChainModel,
    PrefixDrafter,
    Verified,
    drafted_places,
    drawn_metrics,
    pick,
    proposal_of,
    wanted_states,
)
from speculators.models.peagle.config import PEagleSpeculatorConfig
from speculators.nn.attention import unrolled_attention
from speculators.nn.block import Blocks, block_attention
from speculators.nn.cache import AttendAt
from speculators.nn.layout import RowLayout, Segment, on_host, rows_of
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import Rotary
from speculators.nn.vocab import mask_token, register_vocab
from speculators.verifier.weights import VerifierHead


@attrs.frozen(eq=False)
class Elements:
    """Rows that are drafted from at depths beyond the first, all on the host.

    Attributes:
        anchors: [G] int64, ascending rows.
        counts: [G] int64, row i has the depths 1 .. counts[i].
    """

    anchors: torch.Tensor
    counts: torch.Tensor

    @classmethod
    @on_host()
    def draw(cls, rows: torch.Tensor, depths: int, *, keep: float, keep_min: float, at_most: int) -> Elements:
        """Draws anchors from `rows` [n], and how many depths each has: those of a deeper depth are among a shallower's.

        Depth d has round(max(keep ** d, keep_min) * seeds) of the min(n, at_most) seeds. Uses torch's global generator,
        which training seeds for each row of each step.
        """
        seeds = torch.randperm(len(rows))[:at_most]
        kept = [round(max(keep**depth, keep_min) * len(seeds)) for depth in range(1, depths)]
        counts = torch.zeros(len(seeds), dtype=torch.int64)
        for number in kept:
            counts[:number] += 1
        order = seeds.argsort()
        order = order[counts[order] > 0]
        return cls(rows[seeds[order]], counts[order])

    @property
    @on_host()
    def rows(self) -> torch.Tensor:
        """[E] the row of each element, in order."""
        return self.anchors.repeat_interleave(self.counts)

    @property
    @on_host()
    def depths(self) -> torch.Tensor:
        """[E] the depth of each element, from 1."""
        first = self.counts.cumsum(0) - self.counts
        return torch.arange(int(self.counts.sum())) - first.repeat_interleave(self.counts) + 1

    @on_host()
    def blocks(self, documents: tuple[tuple[int, int], ...]) -> Blocks:
        """The attention of the elements: a row is its own context's end, and it is seen."""
        return Blocks.of(self.anchors, self.counts, self.anchors + 1, documents)


@SpeculatorModel.register("peagle")
class PEagleDraftModel(ChainModel):
    """The P-EAGLE draft model.

    Args:
        config: complete, as in config.json.
    """

    not_saved = ("target_head.", "rotary.")

    def __init__(self, config: PEagleSpeculatorConfig) -> None:
        decoder = config.transformer_layer_config
        config = attrs.evolve(config, mask_token_id=mask_token(config.mask_token_id, decoder))
        super().__init__(config)
        shape = Shape.of(decoder)
        size, eps = shape.hidden_size, shape.rms_norm_eps
        states = len(config.eagle_aux_hidden_state_layer_ids)
        self.vocab_size: int = decoder["vocab_size"]
        self.draft_vocab_size = config.draft_vocab_size or self.vocab_size
        self.embed_tokens = nn.Embedding(self.vocab_size, size).requires_grad_(False)
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, states * size))
        self.fc = nn.Linear(states * size, size, bias=False)
        self.input_norm = RMSNorm(states * size, eps) if config.norm_before_fc else None
        first = DecoderLayer(shape, with_embeddings=True, norm_before_residual=config.norm_before_residual)
        self.layers = nn.ModuleList([first, *(DecoderLayer(shape) for _ in range(1, decoder["num_hidden_layers"]))])
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, self.draft_vocab_size, bias=False).requires_grad_(config.lm_head_trainable)
        register_vocab(self, self.vocab_size, self.draft_vocab_size)
        self.rotary = Rotary(decoder)
        self.target_head: VerifierHead | None = None
        self.scale = shape.head_dim**-0.5
        self.window = decoder.get("sliding_window")

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> PEagleDraftModel:
        """Builds the model with the verifier's embeddings and head rows; none where `verifier_name_or_path` is None."""
        ids = tuple(kwargs["target_layer_ids"])
        model = cls(PEagleSpeculatorConfig.pick({**kwargs, "eagle_aux_hidden_state_layer_ids": ids}))
        take_over(model, verifier_config, kwargs, head_trainable=model.config.lm_head_trainable)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Depths, what is drawn of them, and the loss; validation uses the same."""
        chosen = {name: kwargs[name] for name in ("num_depths", "keep", "keep_min", "max_anchors", "loss")}
        return chosen, chosen

    def forward(
        self,
        *,
        hidden_states: torch.Tensor,
        verifier_last_hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        num_depths: int,
        keep: float,
        keep_min: float,
        max_anchors: int,
        loss: dict[str, float],
        layout: RowLayout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Drafts supervised places from drawn elements of a packed row and computes the loss (section 3).

        Returns:
            The draft's normed states [M, H] of the M elements that draft a supervised place; their loss, summed over
            depths and divided by the number of supervised places, where a depth weighs what `keep` leaves of it
            however few rows `max_anchors` allows; and accuracies by depth.
        """
        layout, _kept, (fused, last, tokens, positions) = (
            layout or RowLayout.of(document_ids, loss_mask)
        ).without_padding(hidden_states[0], verifier_last_hidden_states[0], input_ids[0], position_ids[0])
        device = tokens.device
        segments = layout.reaching(2, 2)
        candidates = rows_of(layout.reaching(3, num_depths + 1), torch.device("cpu"))
        drawn = Elements.draw(candidates, num_depths, keep=keep, keep_min=keep_min, at_most=max_anchors)
        # As if all rows that could be anchors had been drawn from.
        scale = len(candidates) / max(1, min(len(candidates), max_anchors))
        drafts, depth, place, weights = _drafts(layout, segments, drawn, scale)
        normed = self._run(fused, tokens, positions, layout, segments, drawn)
        states = normed.index_select(0, drafts.to(device, non_blocking=True))
        places = layout.places.to(device, non_blocking=True)
        wanted = wanted_states(last, places[place.to(device, non_blocking=True)])
        head = self.target_head
        assert head is not None, "a model that was loaded to draft cannot compute its training target"
        result = head_loss(
            states[None],
            self.lm_head.weight,
            weights[None].to(device, non_blocking=True),
            lambda chunk: head.logits(wanted[chunk]),
            mixture(loss),
        )
        total = result.per_depth.sum()
        return states, total, drawn_metrics(total, result.right[0], layout, num_depths, depth, place)

    def _run(
        self,
        hidden_states: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        layout: RowLayout,
        segments: tuple[Segment, ...],
        drawn: Elements,
    ) -> torch.Tensor:
        """Returns the normed states [R + E, H] of the query rows of `segments` at depth 0, and of the elements."""
        device, size = tokens.device, layout.size
        rows, depths = (x.to(device, non_blocking=True) for x in (drawn.rows, drawn.depths))
        blocks = drawn.blocks(layout.documents)
        elements = torch.arange(size, size + len(rows), device=device)
        queries = torch.cat((rows_of(segments, device), elements))
        following = tokens[(torch.arange(size, device=device) + 1).clamp_max(size - 1)]

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # Only the last layer may leave rows out: the one above it needs all of them for its keys.
            covered = segments if index == len(self.layers) - 1 else layout.whole()
            split = len(q) - len(rows)
            prefix, own = (k[:size], v[:size]), (k[size:], v[size:])
            options: dict[str, Any] = {"scale": self.scale, "window": self.window}
            out = unrolled_attention(q[:split], prefix, [], covered, **options)
            return torch.cat((out, block_attention(q[split:], prefix, own, blocks, causal=True, **options)))

        state = torch.cat((self.enter(hidden_states), self._unknown(len(rows))))
        read = torch.cat((following, tokens.new_full((len(rows),), self.config.mask_token_id)))
        return self.step(state, read, torch.cat((positions, positions[rows] + depths)), attend, queries)

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[S, A*H] auxiliary states -> [S, H]."""
        if self.input_norm is not None:
            hidden_states = self.input_norm(hidden_states)
        return self.fc(hidden_states.to(self.fc.weight.dtype))

    def _unknown(self, count: int) -> torch.Tensor:
        """[count, H], the state of places that the verifier has not seen."""
        return self.enter(self.mask_hidden[0]).expand(count, -1)

    def step(
        self,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: AttendAt,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs the decoder; see `ChainModel`. What it leaves is normed."""
        embeddings = self.embed_tokens(tokens)
        return self.norm(
            run_layers(self.layers, state, self.rotary(positions), attend, embeddings=embeddings, rows=rows)
        )

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
        """Yields for each depth the draft logits [S, D] in float32."""
        whole = RowLayout.of(document_ids, torch.zeros_like(document_ids, dtype=torch.bool))
        layout, kept, (fused, tokens, positions) = whole.without_padding(
            hidden_states[0], input_ids[0], position_ids[0]
        )
        further = num_speculative_tokens - 1
        every = torch.arange(layout.size if further else 0)
        elements = Elements(every, torch.full_like(every, further))
        normed = self._run(fused, tokens, positions, layout, layout.whole(), elements)
        by_depth = [normed[: layout.size], *normed[layout.size :].unflatten(0, (-1, max(1, further))).unbind(1)]
        for states in by_depth[:num_speculative_tokens]:
            logits = torch.zeros(whole.size, self.draft_vocab_size, device=input_ids.device)
            logits[kept] = self.logits(states)
            yield logits

    def draft(self) -> PEagleDrafter:
        """Returns a drafter that decodes with this model."""
        return PEagleDrafter(self, tuple(self.config.eagle_aux_hidden_state_layer_ids))


@on_host()
def _drafts(
    layout: RowLayout, segments: tuple[Segment, ...], drawn: Elements, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns which of the R + E outputs draft a supervised place, their depth, the place, and their weight; [M] each.

    Args:
        scale: of the weights of depths beyond the first.
    """
    first = rows_of(segments, torch.device("cpu"))
    depths = torch.cat((torch.zeros_like(first), drawn.depths))
    drafts, place = drafted_places(layout, torch.cat((first, drawn.rows)), depths)
    depth = depths[drafts]
    return drafts, depth, place, torch.where(depth > 0, scale, 1.0) / max(1, len(layout.places))


class PEagleDrafter(PrefixDrafter):
    """Drafts chains: all tokens beyond the first from one forward over mask elements."""

    model: PEagleDraftModel

    @torch.no_grad()
    def propose(
        self, state: Verified, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`; greedy at temperature 0, sampled from softmax(logits / T) otherwise."""
        model, further = self.model, num_tokens - 1
        normed, cache = state.state, state.cache
        if further > 0:
            last = torch.tensor([cache.length - 1])
            blocks = Elements(last, torch.tensor([further])).blocks(((0, cache.length),))

            def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                prefix, own = cache.layers[index], (k, v)
                return block_attention(q, prefix, own, blocks, scale=model.scale, window=model.window, causal=True)

            positions = torch.arange(cache.length, cache.length + further, device=normed.device)
            masks = torch.full_like(positions, model.config.mask_token_id)
            normed = torch.cat((normed, model.step(model._unknown(further), masks, positions, attend, None)))
        picks = [pick(logits, temperature, generator) for logits in model.logits(normed)]
        return proposal_of(picks, self.draft_to_target, model.vocab_size)
