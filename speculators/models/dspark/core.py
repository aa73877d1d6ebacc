"""DSpark (arXiv 2607.05147): a drafted block whose tokens depend on each other, and that is cut where it gets unlikely.

The slots' states come from one forward, as in every block drafter. A Markov head then adds to each slot's logits a
bias that the token before it gives, so that tokens are chosen one after the other; and a confidence head tells how
likely the verifier is to accept a slot's token if it accepted those before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from speculators.drafter import Proposal, chain
from speculators.facts import VerifierFacts
from speculators.losses import Draft, Target, acceptance, head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.anchored import BlockDrafter, BlockDraftModel, BlockSequence, decay_weights
from speculators.models.base_components import take_over
from speculators.models.chains import drawn_metrics, pick, proposal_of
from speculators.models.dspark.config import DSparkSpeculatorConfig
from speculators.nn.layout import RowLayout


class MarkovHead(nn.Module):
    """Logit biases from the token before: W2 f(W1[previous]).

    Args:
        kind: f is the identity ("vanilla"), a gate from state and embedding ("gated"), or a recurrence ("rnn").
    """

    def __init__(self, kind: str, vocab_size: int, draft_vocab_size: int, size: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, draft_vocab_size, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(size + rank, rank)
        if kind == "rnn":
            # Gate, candidate and output side by side, of [carried; embedding; state]: the layout that others read.
            self.joint_proj = nn.Linear(size + 2 * rank, 3 * rank)
        # It starts without effect, and the block as the backbone drafts it.
        nn.init.normal_(self.markov_w1.weight, std=0.02)
        nn.init.zeros_(self.markov_w2.weight)

    def forward(
        self, states: torch.Tensor, previous: torch.Tensor, carried: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns features that W2 multiplies and embeddings of the tokens before, [..., K, r], and what is carried on.

        Args:
            states: [..., K, H] of slots in order.
            previous: [..., K] int64, the token before each.
            carried: [..., r], what the recurrence carried out of the slot before the first; None at a block's start.
        """
        embedded = self.markov_w1(previous)
        if self.kind == "vanilla":
            return embedded, embedded, None
        states = states.to(embedded.dtype)
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat((states, embedded), -1))) * embedded, embedded, None
        held = torch.zeros_like(embedded[..., 0, :]) if carried is None else carried
        found = []
        for state, token in zip(states.unbind(-2), embedded.unbind(-2), strict=True):
            gate, candidate, out = self.joint_proj(torch.cat((held, token, state), -1)).chunk(3, -1)
            keep = torch.sigmoid(gate)
            held = keep * held + (1 - keep) * torch.tanh(candidate)
            found.append(torch.tanh(out))
        return torch.stack(found, -2), embedded, held


class ConfidenceHead(nn.Module):
    """How likely the verifier accepts a slot's token, as a logit."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [...] float32."""
        return self.proj(x)[..., 0].float()


@SpeculatorModel.register("dspark")
class DSparkDraftModel(BlockDraftModel):
    """The DSpark draft model.

    Args:
        config: complete, as in config.json.
    """

    # Any block drafter of the same shape has it.
    backbone = ("fc.", "hidden_norm.", "layers.", "norm.")

    def __init__(self, config: DSparkSpeculatorConfig) -> None:
        super().__init__(config)
        size, rank = config.transformer_layer_config["hidden_size"], config.markov_rank
        self.markov_head = MarkovHead(config.markov_head_type, self.vocab_size, self.draft_vocab_size, size, rank)
        self.confidence_head = ConfidenceHead(size + rank if config.confidence_head_with_markov else size)

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> DSparkDraftModel:
        """Builds the model with the verifier's embeddings and head rows; none where `verifier_name_or_path` is None."""
        ids = tuple(kwargs["target_layer_ids"])
        model = cls(DSparkSpeculatorConfig.pick({**kwargs, "aux_hidden_state_layer_ids": ids}))
        take_over(model, verifier_config, kwargs)
        return model

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Blocks a row, the weights of slots, and the losses; validation uses the same."""
        chosen = {name: kwargs[name] for name in ("max_anchors", "gamma", "confidence_weight", "loss")}
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
        gamma: float | None,
        confidence_weight: float,
        loss: dict[str, float],
        layout: RowLayout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Drafts blocks at drawn anchors of a packed row and computes the loss (section 3).

        Returns:
            The states [M, H] of the slots that draft a supervised place; the weighted mean over the supervised places
            of loss and confidence's cross-entropy, as if all anchors had been drawn; accuracies by depth and
            "confidence_error", how far the confidence is from the acceptance it foretells.
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
        features, embedded, _ = self.markov_head(drawn.states, drawn.previous)
        states, head = drawn.of_drafts(drawn.states), self.target_head
        assert head is not None, "a model that was loaded to draft cannot compute its training target"
        weights = decay_weights(drawn, self.depths, gamma) * drawn.scale
        accepted: list[torch.Tensor] = []
        chosen = mixture(loss)

        def noted(draft: Draft, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
            accepted.append(acceptance(draft, target))
            return chosen(draft, target)

        # logits = lm_head state + W2 f: one product with both heads side by side.
        inputs = torch.cat((states, drawn.of_drafts(features).to(states.dtype)), 1)
        result = head_loss(
            inputs[None],
            self.markov_head.markov_w2.weight,
            weights[None],
            lambda chunk: head.logits(drawn.wanted[chunk]),
            noted,
            frozen=self.lm_head.weight,
        )
        told = drawn.of_drafts(self.confidence(drawn.states, embedded))
        truth = torch.cat(accepted) if accepted else torch.zeros_like(told)
        doubt = nn.functional.binary_cross_entropy_with_logits(told, truth, weight=weights, reduction="sum")
        total = result.per_depth.sum() + confidence_weight * doubt
        metrics = drawn_metrics(total, result.right[0], drawn.layout, self.depths, drawn.depth, drawn.place)
        error = (torch.sigmoid(told.detach()) - truth).abs().sum() / max(1, len(told))
        return states, total, {**metrics, "confidence_error": error}

    def confidence(self, states: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        """Returns logits [..., K] from states [..., K, H] and the embeddings [..., K, r] of the tokens before."""
        if self.config.confidence_head_with_markov:
            states = torch.cat((states, embedded.to(states.dtype)), -1)
        return self.confidence_head(states)

    @property
    def cuts(self) -> bool:
        """Whether the confidence cuts blocks."""
        return self.config.cut is not None

    def lengths(self, confidence: torch.Tensor) -> torch.Tensor:
        """Returns [...] int64, how many of K slots are drafted, from their confidence logits [..., K]."""
        reached = torch.sigmoid(confidence).cumprod(-1)
        bar = self.config.threshold
        if self.config.cut is None:
            kept = torch.ones_like(reached, dtype=torch.bool)
        elif self.config.cut == "threshold":
            kept = reached >= bar
        else:
            # One more token is worth its cost while it gives more than the round gives so far, for the same cost.
            count = torch.arange(reached.shape[-1], device=reached.device)
            before = 1 + reached.cumsum(-1) - reached
            kept = reached >= bar * before / (1 + bar * count)
        return kept.long().cumprod(-1).sum(-1)

    @torch.no_grad()
    def replay(self, **batch: Any) -> Iterator[torch.Tensor]:
        """Yields for each depth the draft logits [S, D] in float32, at most as many as a block drafts.

        Args:
            batch: of `replay_states`, as of all that follows.
        """
        states, features, _ = self._replayed(**batch)
        for depth in range(states.shape[1]):
            yield self.biased(states[:, depth], features[:, depth])

    @torch.no_grad()
    def replay_lengths(self, **batch: Any) -> torch.Tensor:
        """Returns [S] int64, how many tokens a live round drafts from each row.

        With `confidence_head_with_markov` it is what a round drafts whose drafts are right: behind a wrong one, where
        nothing is accepted, live may stop elsewhere.
        """
        states, _, embedded = self._replayed(**batch)
        return self.lengths(self.confidence(states, embedded))

    def _replayed(self, **batch: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns states [S, K, H], features and embeddings [S, K, r] of all rows."""
        states = self.replay_states(**batch).to(self.fc.weight.dtype)
        tokens = batch["input_ids"][0]
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        following = (rows + 1 + torch.arange(states.shape[1], device=tokens.device)).clamp_max(len(tokens) - 1)
        features, embedded, _ = self.markov_head(states, tokens[following])
        return states, features, embedded

    def biased(self, states: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Returns the draft logits [R, D] in float32 of states [R, H] and the Markov head's features [R, r]."""
        return self.logits(states) + self.markov_head.markov_w2(features).float()

    def draft(self) -> DSparkDrafter:
        """Returns a drafter that decodes with this model."""
        return DSparkDrafter(self)


class DSparkDrafter(BlockDrafter):
    """Drafts chains: the tokens of one block, each chosen after the one before, up to where the confidence cuts it."""

    @torch.no_grad()
    def propose(
        self, state: BlockSequence, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts a chain of up to `num_tokens`, at most as many as a block drafts."""
        model = self.model
        states = self.block(state, num_tokens)
        token = state.anchor
        carried: torch.Tensor | None = None
        picks, told = [], []
        for slot in states:
            features, embedded, carried = model.markov_head(slot[None], token, carried)
            picks.append(pick(model.biased(slot[None], features)[0], temperature, generator))
            told.append(model.confidence(slot[None], embedded))
            token = self.draft_to_target[picks[-1][0]]
        if not picks:
            return chain(token[:0])
        kept = int(model.lengths(torch.cat(told)))
        return proposal_of(picks[:kept], self.draft_to_target, model.vocab_size)
