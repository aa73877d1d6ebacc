"""DFlash (arXiv 2602.06036): drafts a block of tokens at once, in slots that all see each other.

The verifier's states enter every layer as keys and values; the slots only carry the anchor token and masks. One forward
drafts the whole block, each token chosen by itself. `models/anchored.py` has the backbone; this file adds the loss,
whose weights favour the first slots, since a rejected draft makes those after it worthless.
"""

from __future__ import annotations

from typing import Any

import torch

from speculators.drafter import Proposal
from speculators.losses import head_loss, mixture, place_loss
from speculators.model import SpeculatorModel
from speculators.models.anchored import BlockDrafter, BlockDraftModel, BlockSequence, Drawn, decay_weights
from speculators.models.base_components import same_kwargs, target_logits
from speculators.models.branches import SlotBranches
from speculators.models.chains import pick, proposal_of
from speculators.models.dflash.config import DFlashSpeculatorConfig
from speculators.models.places import drawn_metrics, running_sum
from speculators.nn.layout import PackedRow


@SpeculatorModel.register("dflash")
class DFlashDraftModel(BlockDraftModel):
    """The DFlash draft model.

    Args:
        config: complete, as in config.json.
    """

    config_class = DFlashSpeculatorConfig
    independent_slots = True

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Picks blocks per row, the weights of slots and the loss, the same for validation."""
        return same_kwargs(kwargs, "max_anchors", "weights", "pace", "gamma", "until_failure", "loss")

    def forward(
        self,
        *,
        hidden_states: torch.Tensor,
        verifier_last_hidden_states: torch.Tensor,
        max_anchors: int,
        weights: str,
        pace: float,
        gamma: float | None,
        until_failure: bool,
        loss: dict[str, float],
        **batch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Drafts blocks at drawn anchors of a packed row and computes the loss (section 3.3).

        Returns:
            The states [M, H] of the slots that draft a supervised place; their weighted mean loss over the supervised
            places, as if all anchors had been drawn; and accuracies by depth.
        """
        row = PackedRow.of(**batch)
        fused, last = row.cut(hidden_states), row.cut(verifier_last_hidden_states)
        drawn = self.draw(row, fused, last, max_anchors=max_anchors)
        states = drawn.of_drafts(drawn.states)  # [M, H]
        targets = target_logits(self.target_head, drawn.target_states)
        if weights == "d-pace":
            # D-PACE's weights depend on the losses, so they come first and are weighted after.
            values, right = place_loss(states, self.lm_head.weight, targets, mixture(loss))
            by_place = pace_weights(values.detach(), drawn, self.depths, pace)
            if until_failure:
                by_place = drawn.until_failure(by_place, right)
            total = (values * by_place).sum() * drawn.scale
        else:
            # Exponential decay is known beforehand, so head and loss can be one pass.
            by_place = decay_weights(drawn, self.depths, gamma) * drawn.scale
            chosen = drawn.weigh_until_failure(by_place) if until_failure else by_place[None]
            result = head_loss(states[None], self.lm_head.weight, chosen, targets, mixture(loss))
            total, right = result.per_depth.sum(), result.right[0]
        return states, total, drawn_metrics(total, right, drawn.layout, self.depths, drawn.depth, drawn.place)

    def draft(self) -> DFlashDrafter:
        """Makes a drafter that decodes with this model."""
        return DFlashDrafter(self)


def pace_weights(values: torch.Tensor, drawn: Drawn, depths: int, pace: float) -> torch.Tensor:
    """Weighs each draft by how many slots from it on a round is expected to reach (D-PACE, arXiv 2605.18810).

    Slot i is reached with P_i = prod_{j <= i} s_j, s_j = (1 - pace) q_j + pace, where q_j is the draft's probability of
    the target token, exp(-cross-entropy). The weight of slot j is sum_{i >= j} P_i, divided by the block's slots. Slots
    without a supervised place count neither in the product nor in the sum.

    Args:
        values: [M] cross-entropies, detached.

    Returns:
        [M].
    """
    blocks, place = len(drawn.anchors), (drawn.block * depths + drawn.depth).to(values.device, non_blocking=True)
    # Slots without a supervised place stay at 1, and so do not change the product.
    softened = torch.ones(blocks * depths, device=values.device, dtype=values.dtype)
    softened = softened.index_copy(0, place, (1 - pace) * (-values).exp() + pace).view(blocks, depths)  # [G, K]
    supervised = torch.zeros_like(softened).view(-1).index_fill(0, place, 1.0).view(blocks, depths)
    reached = softened.cumprod(1) * supervised
    # A suffix sum: flip, cumulate, flip back.
    ahead = running_sum(reached.flip(1)).flip(1)
    return ahead.flatten()[place] / depths


class DFlashDrafter(BlockDrafter):
    """Drafts chains: the tokens of one block, each chosen by itself."""

    @torch.no_grad()
    def propose(
        self, state: BlockSequence, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`, at most as many as a block drafts."""
        model = self.model
        picks = [pick(logits, temperature, generator) for logits in model.logits(self.block(state, num_tokens))]
        return proposal_of(picks, self.draft_to_target, model.vocab_size)

    @torch.no_grad()
    def begin_tree(self, state: BlockSequence, num_levels: int) -> SlotBranches:
        """Starts a tree over the slots of one block; see `DraftsTrees`."""
        return SlotBranches(self.model.logits(self.block(state, num_levels)))
