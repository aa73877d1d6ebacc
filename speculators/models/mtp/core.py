"""Multi-token prediction: one decoder layer, used again for every depth, in front of the verifier's own head.

Row i pairs the verifier's normed last state at place i with token x_{i+1} and drafts x_{i+2}; further depths feed the
layer's normed output back (FastMTP, arXiv 2509.18362). Qwen3-Next and Qwen3.5 come with such a layer, which is then
where training starts (`native`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from speculators.errors import ArtifactError, ContractError
from speculators.facts import VerifierFacts
from speculators.losses import head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.chains import (
    ChainDrafter,
    RecurrentModel,
    chain_metrics,
    copy_norm,
    depth_weights,
    unroll_to_places,
    wanted_states,
)
from speculators.models.mtp.config import MtpSpeculatorConfig
from speculators.models.mtp.layers import MtpLayer, native_decoder
from speculators.models.mtp.native import extract
from speculators.nn.cache import AttendAt
from speculators.nn.layout import RowLayout
from speculators.nn.norm import RMSNorm
from speculators.nn.rotary import Rotary
from speculators.verifier.weights import VerifierHead, load_embeddings, load_head

# Logit of a token that the data does not have: its probability is exactly 0, its product with 0 is not nan.
_IMPOSSIBLE = -1e4


@SpeculatorModel.register("mtp")
class MtpDraftModel(RecurrentModel):
    """The MTP draft model.

    Args:
        config: complete, as in config.json.
    """

    not_saved = ("target_head.", "rotary.")

    def __init__(self, config: MtpSpeculatorConfig) -> None:
        super().__init__(config)
        decoder = config.transformer_layer_config
        size = decoder["hidden_size"]
        self.vocab_size: int = decoder["vocab_size"]
        self.draft_vocab_size = self.vocab_size
        self.embed_tokens = nn.Embedding(self.vocab_size, size).requires_grad_(False)
        self.mtp_layers = nn.ModuleList([MtpLayer(decoder)])
        self.verifier_norm = RMSNorm(size, decoder["rms_norm_eps"]).requires_grad_(False)
        self.lm_head = nn.Linear(size, self.vocab_size, bias=False).requires_grad_(False)
        self.rotary = Rotary(decoder)
        self.target_head: VerifierHead | None = None
        self.scale = decoder["head_dim"] ** -0.5
        self.window = decoder.get("sliding_window")

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]  # the served layout has another name for it
        """The one layer, by the name of the contract."""
        return self.mtp_layers

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> MtpDraftModel:
        """Builds the model with the verifier's embeddings, norm, head and, if `native`, its MTP layer.

        Raises:
            ContractError: a reduced draft vocabulary, or a native head of an architecture that is not known.
            ArtifactError: `native`, and the verifier has no such head.
        """
        if kwargs["draft_vocab_size"] != verifier_config.vocab_size:
            message = f"the verifier's own head drafts all {verifier_config.vocab_size} tokens"
            raise ContractError(message, hint="leave out algorithm.draft_vocab_size")
        decoder = kwargs["transformer_layer_config"]
        if kwargs["native"]:
            decoder = native_decoder(decoder, verifier_config)
        facts = {"transformer_layer_config": decoder, "target_layer_ids": (verifier_config.num_hidden_layers,)}
        model = cls(MtpSpeculatorConfig.pick({**kwargs, **facts}))
        if kwargs["verifier_name_or_path"] is not None:
            model._take_over(Path(kwargs["verifier_name_or_path"]), verifier_config, kwargs)
        return model

    def _take_over(self, folder: Path, facts: VerifierFacts, kwargs: dict[str, Any]) -> None:
        # What stays frozen keeps the file's dtype: a float32 copy of a bf16 embedding is memory without a use.
        head = load_head(folder, facts, dtype=None)
        copy_norm(self.verifier_norm, head)
        self.lm_head.weight.data = head.weight
        self.embed_tokens.weight.data = head.weight if head.rules.tied else load_embeddings(folder)
        self.target_head = head.to(getattr(torch, kwargs["dtype"]))
        if kwargs["native"]:
            found = {name: tensor.float() for name, tensor in extract(folder).items()}
            wanted = {name: value for name, value in self.state_dict().items() if name.startswith("mtp_layers.")}
            wrong = sorted(set(found) ^ set(wanted)) or sorted(k for k in wanted if found[k].shape != wanted[k].shape)
            if wrong:
                raise ArtifactError(f"{folder}: its MTP head is not one of {facts['model_type']}: {', '.join(wrong)}")
            self.load_state_dict(found, strict=False)

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Depths, their weights, targets and loss; validation uses the same."""
        chosen = {name: kwargs[name] for name in ("mtp_steps", "mtp_beta", "targets", "loss")}
        return chosen, chosen

    def forward(
        self,
        *,
        verifier_last_hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        loss_mask: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        mtp_steps: int,
        mtp_beta: float,
        targets: str,
        loss: dict[str, float],
        layout: RowLayout | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Unrolls `mtp_steps` depths over a packed row and computes the loss.

        Returns:
            The draft's states [K, N, H] at the N supervised places, the mean loss over those places summed over depths
            with normalised weights mtp_beta ** k, and accuracies by depth.
        """
        layout, _kept, (last, tokens, positions) = (layout or RowLayout.of(document_ids, loss_mask)).without_padding(
            verifier_last_hidden_states[0], input_ids[0], position_ids[0]
        )
        unrolled = unroll_to_places(self, self.enter(last), tokens, positions, layout, mtp_steps)
        powers = [mtp_beta**depth for depth in range(mtp_steps)]
        weights = depth_weights([power / sum(powers) for power in powers], unrolled.valid)
        head = self.target_head
        assert head is not None, "a model that was loaded to draft cannot compute its training target"
        wanted, said = wanted_states(last, unrolled.places), tokens[unrolled.places]

        def target_logits(chunk: slice) -> torch.Tensor:
            if targets == "verifier":
                return head.logits(wanted[chunk])
            known = said[chunk, None]
            logits = torch.full((len(known), self.vocab_size), _IMPOSSIBLE, device=known.device)
            return logits.scatter_(1, known, 0.0)

        result = head_loss(unrolled.states, self.lm_head.weight, weights, target_logits, mixture(loss))
        total = result.per_depth.sum()
        return unrolled.states, total, chain_metrics(total, result.right, unrolled.rows, unrolled.valid, layout.size)

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The verifier's last states [S, H], normed."""
        return self.verifier_norm(hidden_states)

    def step(
        self,
        state: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        attend: AttendAt,
        rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Runs the layer once; see `RecurrentModel`."""
        embeddings = self.embed_tokens(tokens)
        return self.mtp_layers[0](state, embeddings, self.rotary(positions), lambda *qkv: attend(0, *qkv), rows)

    def draft(self) -> ChainDrafter:
        """Returns a drafter that decodes with this model."""
        return ChainDrafter(self, self.config.target_layer_ids)
