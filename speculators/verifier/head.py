"""Computes the verifier's logits from its hidden states without the verifier: final norm and head."""

from __future__ import annotations

import math
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn.functional import linear

from speculators.errors import VerifierError
from speculators.facts import VerifierFacts
from speculators.verifier.architecture import Skeleton, final_norm, parallel_streams


@attrs.frozen(kw_only=True)
class HeadRules:
    """How an architecture computes logits from its last hidden state.

    Attributes:
        eps: of the final norm.
        unit_offset: the norm multiplies by (1 + w), not w (Gemma 1-3, Qwen3-Next, Qwen3.5).
        centered: the norm subtracts the mean first (LayerNorm; Cohere).
        scale: logits are multiplied by it (Granite divides, Cohere multiplies).
        softcap: logits become cap * tanh(logits / cap) (Gemma 2); None for none.
        tied: the head is the embedding.
        norm_name: of the final norm's module, beside the decoder layers.
    """

    eps: float
    unit_offset: bool
    centered: bool
    scale: float
    softcap: float | None
    tied: bool
    norm_name: str = "norm"

    @classmethod
    def of(cls, facts: VerifierFacts) -> HeadRules:
        """Derives the rules from the architecture: its final norm is tried out, not looked up by name.

        Raises:
            VerifierError: transformers does not know the architecture, the norm has an unknown formula, or several
                residual streams run side by side.
        """
        whole = Skeleton.of(facts)
        if key := parallel_streams(whole.text):
            message = f"{facts.source}: {key} says that several residual streams run side by side"
            raise VerifierError(message, hint="drafts read one state per layer: such a verifier is not supported")
        size, settings = int(whole.text.hidden_size), whole.text.to_dict()
        try:
            name, norm = final_norm(whole.model, size)
            rules = _try_norm(norm, size)
        except VerifierError as error:
            raise VerifierError(f"{facts.source}: {error}") from error
        multipliers = [settings.get(key) or 1.0 for key in ("logit_scale", "lm_head_multiplier")]
        return cls(
            **rules,
            scale=math.prod(multipliers) / (settings.get("logits_scaling") or 1.0),
            softcap=settings.get("final_logit_softcapping"),
            tied=bool(whole.config.tie_word_embeddings),
            norm_name=name,
        )


class VerifierHead(nn.Module):
    """The verifier's final norm and (rows of) its head, frozen. No state dict contains them.

    Args:
        weight: [rows, H], the head.
        norm_weight: [H].
        rules: of the architecture.
    """

    weight: torch.Tensor
    norm_weight: torch.Tensor

    def __init__(self, weight: torch.Tensor, norm_weight: torch.Tensor, rules: HeadRules) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("norm_weight", norm_weight, persistent=False)
        self.rules = rules
        self.eps, self.unit_offset, self.centered = rules.eps, rules.unit_offset, rules.centered
        self.scale, self.softcap = rules.scale, rules.softcap

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        """Applies the final norm to the last layer's output, [..., H] to [..., H], in the head's dtype."""
        x = hidden.float()
        if self.centered:
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        factor = self.norm_weight.float()
        return (x * (1 + factor if self.unit_offset else factor)).to(self.weight.dtype)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Computes the verifier's logits in float32, [..., H] to [..., rows]."""
        return self.finish(linear(self.normalize(hidden), self.weight).float())

    def finish(self, products: torch.Tensor) -> torch.Tensor:
        """Turns head x normalised state into logits: scaling, then soft-capping. Shape is kept."""
        logits = products if self.scale == 1.0 else products * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _try_norm(norm: nn.Module, size: int) -> dict[str, Any]:
    """Runs the norm with weights 0 and 1, and finds the formula that explains the outputs."""
    norm = norm.to_empty(device="cpu").float()
    values = list(norm.parameters())
    eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
    x = 3.0 + torch.linspace(-1, 1, size)[None]
    if len(values) == 1 and eps is not None:
        outputs = []
        for weight in (0.0, 1.0):
            with torch.no_grad():
                values[0].fill_(weight)
                # The second input is small, so that a wrong eps shows.
                outputs.append(torch.cat([norm(x), norm(x * eps**0.5)]))
        for centered in (False, True):
            middle = x - x.mean() if centered else x
            both = torch.cat([middle, middle * eps**0.5])
            plain = both * torch.rsqrt(both.square().mean(-1, keepdim=True) + eps)
            for unit_offset in (False, True):
                expected = (plain * unit_offset, plain * (1 + unit_offset))
                if all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True)):
                    return {"eps": float(eps), "unit_offset": unit_offset, "centered": centered}
    raise VerifierError(f"the final norm {type(norm).__name__} is neither an RMSNorm nor a LayerNorm without bias")
