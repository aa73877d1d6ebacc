"""P-EAGLE (arXiv 2602.01469): EAGLE-3's decoder, with all drafts of a round from one forward.

Where EAGLE-3 feeds each draft back, P-EAGLE puts a learnt state and a mask token in place of what is not known yet. A
round is one pass instead of K, at the price of drafts that do not depend on each other's tokens.

Element (a, d) is row a at depth d. Depth 0 pairs the verifier's state at place a with token x_{a+1}; deeper ones take
the learnt state and the mask token's embedding instead. At rotary position a + d it drafts x_{a+2+d}, and sees the
depth-0 keys of its document up to a and those of its own row up to its own depth. Training draws how many depths each
row has; replay and live decoding run all of them.
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
from speculators.models.base_components import (
    Shape,
    layers_with_embeddings,
    run_layers,
    same_kwargs,
    take_over,
    target_logits,
)
from speculators.models.branches import SlotBranches
from speculators.models.chains import ChainModel, PrefixDrafter, Verified, pick, proposal_of
from speculators.models.peagle.config import PEagleSpeculatorConfig
from speculators.models.places import drafted_places, drawn_metrics, wanted_states
from speculators.nn.attention import unrolled_attention
from speculators.nn.block import Blocks, block_attention
from speculators.nn.cache import AttendAt
from speculators.nn.layout import PackedRow, RowLayout, Segment, on_host, rows_of
from speculators.nn.norm import RMSNorm
from speculators.nn.vocab import mask_token


@attrs.frozen(eq=False)
class Elements:
    """The rows that have depths beyond the first, all on the host.

    Attributes:
        anchors: [G] int64, ascending rows.
        counts: [G] int64, row i has the depths 1 .. counts[i].
    """

    anchors: torch.Tensor
    counts: torch.Tensor

    @classmethod
    @on_host()
    def draw(cls, rows: torch.Tensor, depths: int, *, keep: float, keep_min: float, at_most: int) -> Elements:
        """Draws anchors from `rows` [n] and the number of depths of each (section 3.2).

        Depth d keeps round(max(keep ** d, keep_min) * seeds) of the min(n, at_most) seeds. The draw is nested: a row
        that has depth d has all depths below it. It uses torch's global generator, which training seeds for each row of
        each step.
        """
        seeds = torch.randperm(len(rows))[:at_most]
        sizes = [round(max(keep**depth, keep_min) * len(seeds)) for depth in range(1, depths)]
        counts = torch.zeros(len(seeds), dtype=torch.int64)
        # The first seeds are in every depth: that makes the draw nested.
        for size in sizes:
            counts[:size] += 1
        order = seeds.argsort()
        order = order[counts[order] > 0]
        return cls(rows[seeds[order]], counts[order])

    @property
    @on_host()
    def rows(self) -> torch.Tensor:
        """[E] int64, the row of each element, in order."""
        return self.anchors.repeat_interleave(self.counts)

    @property
    @on_host()
    def depths(self) -> torch.Tensor:
        """[E] int64, the depth of each element, from 1."""
        first = self.counts.cumsum(0) - self.counts
        return torch.arange(int(self.counts.sum())) - first.repeat_interleave(self.counts) + 1

    @on_host()
    def blocks(self, documents: tuple[tuple[int, int], ...]) -> Blocks:
        """Lays out the elements' attention: each row is a block, whose context ends with the row itself."""
        return Blocks.of(self.anchors, self.counts, self.anchors + 1, documents)


@SpeculatorModel.register("peagle")
class PEagleDraftModel(ChainModel):
    """The P-EAGLE draft model.

    Args:
        config: complete, as in config.json.
    """

    independent_slots = True

    def __init__(self, config: PEagleSpeculatorConfig) -> None:
        decoder = config.transformer_layer_config
        config = attrs.evolve(config, mask_token_id=mask_token(config.mask_token_id, decoder))
        super().__init__(config)
        shape = Shape.of(decoder)
        size, eps = shape.hidden_size, shape.rms_norm_eps
        states = len(config.eagle_aux_hidden_state_layer_ids)
        self.add_embeddings()
        # Drawn between embeddings and fc: the order decides a seed's numbers.
        self.mask_hidden = nn.Parameter(torch.randn(1, 1, states * size))
        self.fc = nn.Linear(states * size, size, bias=False)
        self.input_norm = RMSNorm(states * size, eps) if config.norm_before_fc else None
        count = decoder["num_hidden_layers"]
        self.layers = layers_with_embeddings(shape, count, norm_before_residual=config.norm_before_residual)
        self.norm = RMSNorm(size, eps)
        self.add_head(trainable=config.lm_head_trainable)

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> PEagleDraftModel:
        """Builds the model with the verifier's embeddings and head rows; see `take_over`."""
        ids = tuple(kwargs["target_layer_ids"])
        model = cls(PEagleSpeculatorConfig.pick({**kwargs, "eagle_aux_hidden_state_layer_ids": ids}))
        take_over(model, verifier_config, kwargs, head_trainable=model.config.lm_head_trainable)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Picks depths, how many rows have them, and the loss, the same for validation."""
        return same_kwargs(kwargs, "num_depths", "keep", "keep_min", "max_anchors", "loss")

    def forward(
        self,
        *,
        hidden_states: torch.Tensor,
        verifier_last_hidden_states: torch.Tensor,
        num_depths: int,
        keep: float,
        keep_min: float,
        max_anchors: int,
        loss: dict[str, float],
        **batch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Drafts supervised places from drawn elements of a packed row and computes the loss (section 3).

        Returns:
            The draft's normed states [M, H] of the M elements that draft a supervised place; their loss, summed over
            depths and divided by the number of supervised places, where a depth weighs the share that `keep` leaves of
            it even if `max_anchors` allows fewer rows; and accuracies by depth.
        """
        row = PackedRow.of(**batch)
        layout, device = row.layout, row.tokens.device
        # Depth 0 only needs the rows that predict a supervised place themselves: their keys are made for all rows
        # anyway.
        segments = layout.reaching(2, 2)
        candidates = rows_of(layout.reaching(3, num_depths + 1), torch.device("cpu"))
        drawn = Elements.draw(candidates, num_depths, keep=keep, keep_min=keep_min, at_most=max_anchors)
        # The drawn anchors stand for all candidates, so that `max_anchors` does not change the loss's expectation.
        scale = len(candidates) / max(1, min(len(candidates), max_anchors))
        drafts, depth, place, weights = _drafts(layout, segments, drawn, scale)
        normed = self._run(row.cut(hidden_states), row.tokens, row.positions, layout, segments, drawn)
        states = normed.index_select(0, drafts.to(device, non_blocking=True))  # [M, H]
        places = layout.places.to(device, non_blocking=True)[place.to(device, non_blocking=True)]
        targets = wanted_states(row.cut(verifier_last_hidden_states), places)  # [M, H]
        # Each draft is its own "place" of one depth: head_loss then needs no [K, N] grid, which is mostly empty.
        result = head_loss(
            states[None],
            self.lm_head.weight,
            weights[None].to(device, non_blocking=True),
            target_logits(self.target_head, targets),
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
        """Computes the normed states [R + E, H] of the R query rows of `segments` at depth 0 and of the E elements."""
        device, size = tokens.device, layout.size
        rows, depths = (x.to(device, non_blocking=True) for x in (drawn.rows, drawn.depths))
        blocks = drawn.blocks(layout.documents)
        elements = torch.arange(size, size + len(rows), device=device)
        queries = torch.cat((rows_of(segments, device), elements))
        # Depth 0 of row i reads x_{i+1}; the last row repeats its own token, and drafts no supervised place.
        following = tokens[(torch.arange(size, device=device) + 1).clamp_max(size - 1)]

        def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            # Only the last layer may skip rows: each one below it has to give the next layer all of its keys.
            covered = segments if index == len(self.layers) - 1 else layout.whole()
            # One tensor holds both: S rows at depth 0, then the E elements.
            split = len(q) - len(rows)
            prefix, own = (k[:size], v[:size]), (k[size:], v[size:])
            options: dict[str, Any] = {"scale": self.scale, "window": self.window}
            out = unrolled_attention(q[:split], prefix, [], covered, **options)
            return torch.cat((out, block_attention(q[split:], prefix, own, blocks, causal=True, **options)))

        # [S + E, H]: verifier states at depth 0, the learnt state for every element.
        state = torch.cat((self.enter(hidden_states), self._unknown(len(rows))))
        read = torch.cat((following, tokens.new_full((len(rows),), self.config.mask_token_id)))
        return self.step(state, read, torch.cat((positions, positions[rows] + depths)), attend, queries)

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Fuses the verifier's auxiliary states: [S, A*H] -> [S, H]."""
        if self.input_norm is not None:
            hidden_states = self.input_norm(hidden_states)
        return self.fc(hidden_states.to(self.fc.weight.dtype))

    def _unknown(self, count: int) -> torch.Tensor:
        """Repeats the learnt state of places that the verifier has not seen, [count, H]."""
        return self.enter(self.mask_hidden[0]).expand(count, -1)

    def step(
        self,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: AttendAt,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs the decoder; see `ChainModel`. The states it leaves are normed."""
        embeddings = self.embed_tokens(tokens)
        return self.norm(
            run_layers(self.layers, state, self.rotary(positions), attend, embeddings=embeddings, rows=rows)
        )

    def depths(self, row: PackedRow, hidden_states: torch.Tensor, count: int) -> Iterator[torch.Tensor]:
        """Runs all depths of all rows in one pass; see `ChainModel`."""
        layout, further = row.layout, count - 1
        rows = torch.arange(layout.size if further else 0)
        elements = Elements(rows, torch.full_like(rows, further))
        normed = self._run(hidden_states, row.tokens, row.positions, layout, layout.whole(), elements)
        # The elements come row by row: [S * (K - 1), H] -> K - 1 times [S, H].
        by_depth = [normed[: layout.size], *normed[layout.size :].unflatten(0, (-1, max(1, further))).unbind(1)]
        yield from by_depth[:count]

    def draft(self) -> PEagleDrafter:
        """Makes a drafter that decodes with this model."""
        return PEagleDrafter(self, tuple(self.config.eagle_aux_hidden_state_layer_ids))


@on_host()
def _drafts(
    layout: RowLayout, segments: tuple[Segment, ...], drawn: Elements, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Selects the outputs of `_run` that draft a supervised place.

    Args:
        scale: factor of the weights of depths beyond the first.

    Returns:
        Their indices among the R + E outputs, their depths, the indices of the supervised places, and their weights;
        [M] each, on the host.
    """
    first = rows_of(segments, torch.device("cpu"))
    depths = torch.cat((torch.zeros_like(first), drawn.depths))
    drafts, place = drafted_places(layout, torch.cat((first, drawn.rows)), depths)
    depth = depths[drafts]
    return drafts, depth, place, torch.where(depth > 0, scale, 1.0) / max(1, len(layout.places))


class PEagleDrafter(PrefixDrafter):
    """Drafts chains: the first token from the last verified state, all others from one forward over mask elements."""

    def propose(
        self, state: Verified, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`; see `pick` for the temperature."""
        picks = [pick(logits, temperature, generator) for logits in self._slots(state, num_tokens)]
        return proposal_of(picks, self.draft_to_target, self.model.vocab_size)

    def begin_tree(self, state: Verified, num_levels: int) -> SlotBranches:
        """Starts a tree over the tokens of all depths; see `DraftsTrees`."""
        return SlotBranches(self._slots(state, num_levels))

    @torch.no_grad()
    def _slots(self, state: Verified, num_tokens: int) -> torch.Tensor:
        """Computes the logits [K, D] of the next round's depths."""
        model: PEagleDraftModel = self.model
        further = num_tokens - 1
        normed, cache = state.state, state.cache
        if further > 0:
            last = torch.tensor([cache.length - 1])
            blocks = Elements(last, torch.tensor([further])).blocks(((0, cache.length),))

            def attend(index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                prefix, own = cache.read(index), (k, v)
                return block_attention(q, prefix, own, blocks, scale=model.scale, window=model.window, causal=True)

            # Depth d of the last row stands at its position plus d; depth 0 was run when the row was verified.
            positions = torch.arange(cache.length, cache.length + further, device=normed.device)
            masks = torch.full_like(positions, model.config.mask_token_id)
            normed = torch.cat((normed, model.step(model._unknown(further), masks, positions, attend, None)))
        return model.logits(normed)
