"""Medusa (arXiv 2401.10774): heads that each guess one later token from the verifier's last state alone.

Head k (from 0) of row r reads the verifier's normed last state at place r and drafts place r + 2 + k: the verifier's
own head gives r + 1, which is known. A head is residual blocks, x + silu(W x + b), and a projection of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speculators.drafter import Proposal
from speculators.facts import VerifierFacts
from speculators.losses import head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.chains import (
    chain_metrics,
    copy_norm,
    depth_weights,
    pick,
    predicting_rows,
    proposal_of,
    wanted_states,
)
from speculators.models.medusa.config import MedusaSpeculatorConfig
from speculators.nn.layout import RowLayout
from speculators.nn.norm import RMSNorm
from speculators.verifier.weights import VerifierHead, load_head


class ResidualBlocks(nn.Module):
    """The residual part of one head; starts as the identity (section 2.1.1: the head then is the verifier's)."""

    def __init__(self, size: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        for layer in self.layers:
            x = x + nn.functional.silu(layer(x))
        return x


@SpeculatorModel.register("medusa")
class MedusaDraftModel(SpeculatorModel):
    """The Medusa heads.

    Args:
        config: complete, as in config.json.
    """

    not_saved = ("target_head.",)

    def __init__(self, config: MedusaSpeculatorConfig) -> None:
        super().__init__(config)
        size, vocab = config.hidden_size, config.truncated_vocab_size
        self.vocab_size = config.vocab_size
        # Not the draft's own: vLLM hands its heads normed states and passes over this tensor.
        self.verifier_norm = RMSNorm(size, config.transformer_layer_config["rms_norm_eps"]).requires_grad_(False)
        self.blocks = nn.ModuleList([ResidualBlocks(size, config.num_hidden_layers) for _ in range(config.num_heads)])
        self.lm_heads = nn.ModuleList([nn.Linear(size, vocab, bias=False) for _ in range(config.num_heads)])
        if vocab < config.vocab_size:
            self.register_buffer("token_map", torch.zeros(vocab, dtype=torch.int64))
        self.target_head: VerifierHead | None = None

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]  # vLLM's name for them is another
        """The residual blocks, by the name of the contract."""
        return self.blocks

    @property
    def draft_to_target(self) -> torch.Tensor:
        """[D] int64, the verifier's id of each draft id."""
        held = dict(self.named_buffers()).get("token_map")
        return torch.arange(self.vocab_size, device=self.verifier_norm.weight.device) if held is None else held

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> MedusaDraftModel:
        """Builds the heads as copies of the verifier's; random ones where `verifier_name_or_path` is None."""
        facts = {
            "hidden_size": verifier_config.hidden_size,
            "vocab_size": verifier_config.vocab_size,
            "truncated_vocab_size": kwargs["draft_vocab_size"],
            "num_hidden_layers": kwargs["num_layers"],
            "target_layer_ids": (verifier_config.num_hidden_layers,),
        }
        model = cls(MedusaSpeculatorConfig.pick({**kwargs, **facts}))
        ids = None
        if kwargs["d2t"] is not None:
            ids = torch.arange(len(kwargs["d2t"])) + kwargs["d2t"]
            model.get_buffer("token_map").copy_(ids)
        if kwargs["verifier_name_or_path"] is not None:
            folder = Path(kwargs["verifier_name_or_path"])
            head = load_head(folder, verifier_config, rows=ids, dtype=None)
            copy_norm(model.verifier_norm, head)
            for own in model.lm_heads:
                own.weight.data = head.weight.to(torch.float32, copy=True)
            model.target_head = head.to(getattr(torch, kwargs["dtype"]))
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The loss and the weight of each head's; validation uses the same."""
        chosen = {name: kwargs[name] for name in ("head_decay", "loss")}
        return chosen, chosen

    def forward(
        self,
        *,
        verifier_last_hidden_states: torch.Tensor,
        loss_mask: torch.Tensor,
        document_ids: torch.Tensor,
        head_decay: float,
        loss: dict[str, float],
        layout: RowLayout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Computes the loss of all heads over a packed row (section 2.2.1).

        Returns:
            The heads' states [K, N, H] at the N supervised places, the mean loss over those places summed over heads
            with weight head_decay ** k, and accuracies by head.
        """
        layout = layout or RowLayout.of(document_ids, loss_mask)
        last = verifier_last_hidden_states[0]
        device, depths = last.device, len(self.blocks)
        rows, valid = (tensor.to(device, non_blocking=True) for tensor in predicting_rows(layout, depths))
        normed = self.verifier_norm(last)
        states = torch.stack([block(normed[row]) for block, row in zip(self.blocks, rows, strict=True)])
        weights = depth_weights([head_decay**depth for depth in range(depths)], valid)
        target = self.target_head
        assert target is not None, "heads that were loaded to draft cannot compute their training target"
        wanted = wanted_states(last, layout.places.to(device, non_blocking=True))
        results = [
            head_loss(
                states[depth : depth + 1],
                head.get_parameter("weight"),
                weights[depth : depth + 1],
                lambda chunk: target.logits(wanted[chunk]),
                mixture(loss),
            )
            for depth, head in enumerate(self.lm_heads)
        ]
        total = torch.cat([result.per_depth for result in results]).sum()
        right = torch.cat([result.right for result in results])
        return states, total, chain_metrics(total, right, rows, valid, layout.size)

    def head_logits(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields each head's logits [R, D] in float32 for the verifier's last states [R, H], before its final norm."""
        normed = self.verifier_norm(hidden_states)
        for block, head in zip(self.blocks, self.lm_heads, strict=True):
            yield head(block(normed).to(head.weight.dtype)).float()

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
        """Yields the logits [S, D] of each head, at most `num_speculative_tokens`: there are no deeper drafts."""
        yield from islice(self.head_logits(hidden_states[0]), num_speculative_tokens)

    def draft(self) -> MedusaDrafter:
        """Returns a drafter that decodes with these heads."""
        return MedusaDrafter(self)


class MedusaDrafter:
    """Drafts chains: head k's likeliest (or a sampled) token at depth k, whatever the heads before it drafted."""

    def __init__(self, model: MedusaDraftModel) -> None:
        self.model = model
        self.target_layer_ids: tuple[int, ...] = model.config.target_layer_ids
        self.draft_to_target = model.draft_to_target

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Keeps the last verified state; the sequence's state is a list of that one [H]."""
        return [hidden_states[-1]]

    @torch.no_grad()
    def advance(self, state: list[torch.Tensor], tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Takes in what a round emitted: its last state is all that the next one needs."""
        state[0] = hidden_states[-1]

    @torch.no_grad()
    def candidates(self, state: list[torch.Tensor], num_tokens: int) -> torch.Tensor:
        """Returns the logits [K, D] of the next round's heads, K at most `num_tokens`: what a tree is built from."""
        heads = self.model.head_logits(state[0][None])
        return torch.cat(list(islice(heads, num_tokens)))

    @torch.no_grad()
    def propose(
        self, state: list[torch.Tensor], *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`, or as many as there are heads."""
        picks = [pick(logits, temperature, generator) for logits in self.candidates(state, num_tokens)]
        return proposal_of(picks, self.draft_to_target, self.model.vocab_size)
