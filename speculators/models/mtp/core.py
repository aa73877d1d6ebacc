"""Multi-token prediction (FastMTP, arXiv 2509.18362): one decoder layer in front of the verifier's own head.

The layer turns a verifier state and the next token into a state whose head output is the token after that. It is reused
for every depth, on its own output, so K drafts cost K passes of one layer. Qwen3-Next and Qwen3.5 come with such a
layer; with `native` training starts from it.

Row i pairs the verifier's normed last state at place i with token x_{i+1} and drafts x_{i+2}.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speculators.errors import ArtifactError, ContractError
from speculators.facts import VerifierFacts
from speculators.losses import head_loss, mixture
from speculators.model import SpeculatorModel
from speculators.models.base_components import same_kwargs, target_logits
from speculators.models.chains import ChainDrafter, RecurrentModel, copy_norm, unroll_to_places
from speculators.models.mtp.config import MtpSpeculatorConfig
from speculators.models.mtp.kinds import native_decoder
from speculators.models.mtp.layers import MtpLayer
from speculators.models.mtp.native import extract
from speculators.models.places import chain_metrics, depth_weights, wanted_states
from speculators.nn.cache import AttendAt
from speculators.nn.layout import PackedRow
from speculators.nn.norm import RMSNorm
from speculators.verifier.weights import load_embeddings, load_head

# Logit of every token but the data's own. Its probability is exactly 0 in float32, and unlike -inf it times 0 is not
# nan.
_IMPOSSIBLE = -1e4


@SpeculatorModel.register("mtp")
class MtpDraftModel(RecurrentModel):
    """The MTP draft model.

    Args:
        config: complete, as in config.json.
    """

    def __init__(self, config: MtpSpeculatorConfig) -> None:
        super().__init__(config)
        decoder = config.transformer_layer_config
        # Embeddings, norm and head are the verifier's and frozen: only the layer is trained and stitched back.
        self.add_embeddings()
        self.mtp_layers = nn.ModuleList([MtpLayer(decoder)])
        self.verifier_norm = RMSNorm(decoder["hidden_size"], decoder["rms_norm_eps"]).requires_grad_(False)
        self.add_head()

    @property
    def layers(self) -> nn.ModuleList:  # type: ignore[override]  # servers call it mtp_layers
        """The one layer, under the name that the contract asks for."""
        return self.mtp_layers

    @classmethod
    def from_training_args(cls, verifier_config: VerifierFacts, **kwargs: Any) -> MtpDraftModel:
        """Builds the model with the verifier's embeddings, norm, head and, if `native`, its MTP layer.

        Raises:
            ContractError: the draft vocabulary is reduced, or `native` and no layer here has the verifier's
                architecture.
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
        # Frozen tensors keep the file's dtype: a float32 copy of a bf16 embedding would only take memory.
        head = load_head(folder, facts, dtype=None)
        copy_norm(self.verifier_norm, head)
        # With tied embeddings both names share one tensor.
        self.lm_head.weight.data = head.weight
        self.embed_tokens.weight.data = head.weight if head.rules.tied else load_embeddings(folder)
        self.target_head = head.to(getattr(torch, kwargs["dtype"]))
        if kwargs["native"]:
            saved = {name: tensor.float() for name, tensor in extract(folder).items()}
            own = {name: value for name, value in self.state_dict().items() if name.startswith("mtp_layers.")}
            misfits = sorted(set(saved) ^ set(own)) or sorted(
                name for name in own if saved[name].shape != own[name].shape
            )
            if misfits:
                kind = f"{folder}: its MTP head is not one of {facts['model_type']}"
                raise ArtifactError(f"{kind}; missing, unknown or of another shape: {', '.join(misfits)}")
            self.load_state_dict(saved, strict=False)

    @staticmethod
    def get_trainer_kwargs(**kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Picks depths, their weights, targets and the loss, the same for validation."""
        return same_kwargs(kwargs, "mtp_steps", "mtp_beta", "targets", "loss")

    def forward(
        self,
        *,
        verifier_last_hidden_states: torch.Tensor,
        mtp_steps: int,
        mtp_beta: float,
        targets: str,
        loss: dict[str, float],
        **batch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Unrolls `mtp_steps` depths over a packed row and computes the loss.

        L = sum_k w_k mean_n l(p_n, q_{k,n}) over the N supervised places, w_k = beta^k / sum_j beta^j (equation 2).

        Returns:
            The draft's states [K, N, H] at the supervised places, L, and accuracies by depth.
        """
        row = PackedRow.of(**batch)
        last = row.cut(verifier_last_hidden_states)  # [S, H]
        unrolled = unroll_to_places(self, self.enter(last), row.tokens, row.positions, row.layout, mtp_steps)
        # Later depths are reached less often, so their losses count less.
        powers = [mtp_beta**depth for depth in range(mtp_steps)]
        weights = depth_weights([power / sum(powers) for power in powers], unrolled.valid)  # [K, N]
        if targets == "verifier":
            goal = target_logits(self.target_head, wanted_states(last, unrolled.places))
        else:
            goal = self._data_logits(row.tokens[unrolled.places])
        result = head_loss(unrolled.states, self.lm_head.weight, weights, goal, mixture(loss))
        total = result.per_depth.sum()
        metrics = chain_metrics(total, result.right, unrolled.rows, unrolled.valid, row.layout.size)
        return unrolled.states, total, metrics

    def _data_logits(self, tokens: torch.Tensor) -> Callable[[slice], torch.Tensor]:
        """Gives logits [C, V] that put all probability on the data's own tokens [N], a slice at a time."""

        def logits(chunk: slice) -> torch.Tensor:
            own = tokens[chunk, None]
            return torch.full((len(own), self.vocab_size), _IMPOSSIBLE, device=own.device).scatter_(1, own, 0.0)

        return logits

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norms the verifier's last states [S, H]."""
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
        embeddings = self.embed_tokens(tokens)  # [S, H]
        return self.mtp_layers[0](state, embeddings, self.rotary(positions), lambda *qkv: attend(0, *qkv), rows)

    def draft(self) -> ChainDrafter:
        """Makes a drafter that decodes with this model."""
        return ChainDrafter(self, self.config.target_layer_ids)
