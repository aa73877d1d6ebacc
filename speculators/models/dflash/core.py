"""DFlash (arXiv 2602.06036): a block of tokens is drafted at once, by slots that all see each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from speculators.drafter import Proposal
from speculators.facts import VerifierFacts
from speculators.losses import head_loss, mixture, place_loss
from speculators.model import SpeculatorModel
from speculators.models.anchored import BlockDrafter, BlockDraftModel, BlockSequence, Drawn, decay_weights, depth_logits
from speculators.models.base_components import take_over
from speculators.models.chains import drawn_metrics, pick, proposal_of
from speculators.models.dflash.config import DFlashSpeculatorConfig
from speculators.nn.layout import RowLayout


@SpeculatorModel.register("dflash")
class DFlashDraftModel(BlockDraftModel):
    """The DFlash draft model.

    Args:
        config: complete, as in config.json.
    """

    def __init__(self, config: DFlashSpeculatorConfig) -> None:
        super().__init__(config)

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> DFlashDraftModel:
        """Builds the model with the verifier's embeddings and head rows; none where `verifier_name_or_path` is None."""
        ids = tuple(kwargs["target_layer_ids"])
        model = cls(DFlashSpeculatorConfig.pick({**kwargs, "aux_hidden_state_layer_ids": ids}))
        take_over(model, verifier_config, kwargs)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Blocks a row, the weights of slots, and the loss; validation uses the same."""
        chosen = {name: kwargs[name] for name in ("max_anchors", "weights", "pace", "gamma", "loss")}
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
        max_anchors: int,
        weights: str,
        pace: float,
        gamma: float | None,
        loss: dict[str, float],
        layout: RowLayout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Drafts blocks at drawn anchors of a packed row and computes the loss (section 3.3).

        Returns:
            The states [M, H] of the slots that draft a supervised place; their weighted mean loss, as if all anchors
            had been drawn, over the supervised places; and accuracies by depth.
        """
        drawn = self.draw(
            hidden_states=hidden_states,
            verifier_last_hidden_states=verifier_last_hidden_states,
            input_ids=input_ids,
            loss_mask=loss_mask,
            position_ids=position_ids,
            document_ids=document_ids,
            max_anchors=max_anchors,
            layout=layout,
        )
        states, head = drawn.of_drafts(drawn.states), self.target_head
        assert head is not None, "a model that was loaded to draft cannot compute its training target"

        def target_logits(chunk: slice) -> torch.Tensor:
            return head.logits(drawn.wanted[chunk])

        if weights == "d-pace":
            values, right = place_loss(states, self.lm_head.weight, target_logits, mixture(loss))
            total = (values * pace_weights(values.detach(), drawn, self.depths, pace)).sum() * drawn.scale
        else:
            by_place = decay_weights(drawn, self.depths, gamma) * drawn.scale
            result = head_loss(states[None], self.lm_head.weight, by_place[None], target_logits, mixture(loss))
            total, right = result.per_depth.sum(), result.right[0]
        return states, total, drawn_metrics(total, right, drawn.layout, self.depths, drawn.depth, drawn.place)

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
        """Yields for each depth the draft logits [S, D] in float32, at most as many as a block drafts."""
        states = self.replay_states(
            hidden_states=hidden_states,
            input_ids=input_ids,
            position_ids=position_ids,
            document_ids=document_ids,
            num_speculative_tokens=num_speculative_tokens,
        )
        yield from depth_logits(self, states)

    def draft(self) -> DFlashDrafter:
        """Returns a drafter that decodes with this model."""
        return DFlashDrafter(self)


def pace_weights(values: torch.Tensor, drawn: Drawn, depths: int, pace: float) -> torch.Tensor:
    """Returns [M] D-PACE weights: how many slots from this one on a round is expected to reach, over the block's slots.

    Slot i is reached with P_i, the product over the slots up to it of s = (1 - pace) q + pace, where q is the draft's
    probability of the wanted token; w_j is the sum of P_i over i >= j. Slots of no supervised place are passed over.

    Args:
        values: [M] cross-entropies, detached.
    """
    blocks, place = len(drawn.anchors), (drawn.block * depths + drawn.depth).to(values.device, non_blocking=True)
    softened = torch.ones(blocks * depths, device=values.device, dtype=values.dtype)
    softened = softened.index_copy(0, place, (1 - pace) * (-values).exp() + pace).view(blocks, depths)
    there = torch.zeros_like(softened).view(-1).index_fill(0, place, 1.0).view(blocks, depths)
    reached = softened.cumprod(1) * there
    ahead = reached.flip(1).cumsum(1).flip(1)
    return ahead.flatten()[place] / depths


class DFlashDrafter(BlockDrafter):
    """Drafts chains: the tokens of one block, each chosen by itself."""

    @torch.no_grad()
    def propose(
        self, state: BlockSequence, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`, or as many as a block drafts."""
        model = self.model
        picks = [pick(logits, temperature, generator) for logits in model.logits(self.block(state, num_tokens))]
        return proposal_of(picks, self.draft_to_target, model.vocab_size)
