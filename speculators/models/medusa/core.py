"""Medusa (arXiv 2401.10774): heads on the verifier's last state, each of which guesses one later token.

The heads draft in parallel and know nothing of each other's tokens. Head k (from 0) of row r reads the verifier's
normed last state at place r and drafts place r + 2 + k: the verifier's own head gives r + 1, which is known. A head is
residual blocks, x + silu(W x + b), and a projection of its own.
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
from speculators.models.base_components import same_kwargs, target_logits
from speculators.models.branches import SlotBranches
from speculators.models.chains import copy_norm, pick, proposal_of
from speculators.models.medusa.config import MedusaSpeculatorConfig
from speculators.models.places import chain_metrics, depth_weights, predicting_rows, wanted_states
from speculators.nn.layout import RowLayout
from speculators.nn.norm import RMSNorm
from speculators.verifier.weights import VerifierHead, load_head


class ResidualBlocks(nn.Module):
    """The residual blocks of one head; start as the identity, so that the head is the verifier's (section 2.1.1)."""

    def __init__(self, size: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size, size) for _ in range(num_layers)])
        for parameter in self.layers.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds silu(W x + b) block by block: [..., H] -> [..., H]."""
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
    independent_slots = True

    def __init__(self, config: MedusaSpeculatorConfig) -> None:
        super().__init__(config)
        size, vocab = config.hidden_size, config.truncated_vocab_size
        self.vocab_size = config.vocab_size
        # Kept here because replay starts from states before the norm. vLLM norms them itself and skips this tensor.
        self.verifier_norm = RMSNorm(size, config.transformer_layer_config["rms_norm_eps"]).requires_grad_(False)
        # Named as vLLM loads them: blocks.i.layers.j and lm_heads.i.
        self.blocks = nn.ModuleList([ResidualBlocks(size, config.num_hidden_layers) for _ in range(config.num_heads)])
        self.lm_heads = nn.ModuleList([nn.Linear(size, vocab, bias=False) for _ in range(config.num_heads)])
        # vLLM's map of a reduced vocabulary: target ids themselves, where other algorithms save offsets (d2t).
        if vocab < config.vocab_size:
            self.register_buffer("token_map", torch.zeros(vocab, dtype=torch.int64))
        self.target_head: VerifierHead | None = None

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]  # vLLM calls them blocks
        """The residual blocks, under the name that the contract asks for."""
        return self.blocks

    @property
    def draft_to_target(self) -> torch.Tensor:
        """[D] int64, the verifier's id of each draft id."""
        token_map = dict(self.named_buffers()).get("token_map")
        if token_map is None:
            return torch.arange(self.vocab_size, device=self.verifier_norm.weight.device)
        return token_map

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> MedusaDraftModel:
        """Builds the heads as copies of the verifier's, or at random if `verifier_name_or_path` is None."""
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
            # Every head is trained, so each gets a float32 copy of its own.
            for own in model.lm_heads:
                own.weight.data = head.weight.to(torch.float32, copy=True)
            model.target_head = head.to(getattr(torch, kwargs["dtype"]))
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Picks the loss and the weights of the heads, the same for validation."""
        return same_kwargs(kwargs, "head_decay", "loss")

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

        L = sum_k head_decay^k mean_n l(p_n, q_{k,n}) over the N supervised places.

        Returns:
            The heads' states [K, N, H] at the supervised places, L, and accuracies by head.
        """
        layout = layout or RowLayout.of(document_ids, loss_mask)
        last = verifier_last_hidden_states[0]
        # No unroll: all heads read the verifier's state, so head k of row place - 2 - k predicts the place.
        device, depths = last.device, len(self.blocks)
        rows, valid = (tensor.to(device, non_blocking=True) for tensor in predicting_rows(layout, depths))
        normed = self.verifier_norm(last)  # [S, H]
        # Heads read single rows, so only the rows that predict a place are run: [K, N, H].
        states = torch.stack([block(normed[row]) for block, row in zip(self.blocks, rows, strict=True)])
        weights = depth_weights([head_decay**depth for depth in range(depths)], valid)
        targets = target_logits(self.target_head, wanted_states(last, layout.places.to(device, non_blocking=True)))
        heads = [head.get_parameter("weight") for head in self.lm_heads]
        result = head_loss(states, heads, weights, targets, mixture(loss))
        total = result.per_depth.sum()
        return states, total, chain_metrics(total, result.right, rows, valid, layout.size)

    def head_logits(self, hidden_states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields each head's logits [R, D] in float32, from the verifier's last states [R, H] before its final norm."""
        normed = self.verifier_norm(hidden_states)
        for block, head in zip(self.blocks, self.lm_heads, strict=True):
            yield head(block(normed).to(head.weight.dtype)).float()

    @torch.no_grad()
    def replay(
        self, *, hidden_states: torch.Tensor, num_speculative_tokens: int, **batch: Any
    ) -> Iterator[torch.Tensor]:
        """Yields the logits [S, D] of each head, at most `num_speculative_tokens`; deeper drafts do not exist."""
        yield from islice(self.head_logits(hidden_states[0]), num_speculative_tokens)

    def draft(self) -> MedusaDrafter:
        """Makes a drafter that decodes with these heads."""
        return MedusaDrafter(self)


class MedusaDrafter:
    """Drafts chains: at depth k the token of head k, independent of what the heads before it drafted."""

    def __init__(self, model: MedusaDraftModel) -> None:
        self.model = model
        self.target_layer_ids: tuple[int, ...] = model.config.target_layer_ids
        self.draft_to_target = model.draft_to_target

    @torch.no_grad()
    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> list[torch.Tensor]:
        """Starts a sequence; its state is a list that holds the last verified state [H]."""
        return [hidden_states[-1]]

    @torch.no_grad()
    def advance(self, state: list[torch.Tensor], tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Keeps the last state of a round: the next one needs no other."""
        state[0] = hidden_states[-1]

    @torch.no_grad()
    def candidates(self, state: list[torch.Tensor], num_tokens: int) -> torch.Tensor:
        """Computes the logits [K, D] of the next round's heads, K at most `num_tokens`."""
        heads = self.model.head_logits(state[0][None])
        return torch.cat(list(islice(heads, num_tokens)))

    @torch.no_grad()
    def propose(
        self, state: list[torch.Tensor], *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of `num_tokens`, at most one per head."""
        picks = [pick(logits, temperature, generator) for logits in self.candidates(state, num_tokens)]
        return proposal_of(picks, self.draft_to_target, self.model.vocab_size)

    def begin_tree(self, state: list[torch.Tensor], num_levels: int) -> SlotBranches:
        """Starts a tree over the heads' tokens; see `DraftsTrees`."""
        return SlotBranches(self.candidates(state, num_levels))
