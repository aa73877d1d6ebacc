"""By how much a model prefers an emitted token to all others: how close a greedy choice was, and so what rounding does.

A margin m of a token is its logit less the largest other one. The token is the greedy choice where m >= 0; another
program, which adds in another order, may choose otherwise where |m| is no more than rounding.
"""

from __future__ import annotations

import attrs
import numpy as np
import torch

from speculators.bench.referee import NEAR_TIE_LOGITS, NEAR_TIE_SHARE
from speculators.bench.rows import Response
from speculators.chunks import CHUNKS
from speculators.verifier.weights import VerifierHead


@attrs.frozen(eq=False)
class Margins:
    """Margins of the tokens of one response.

    Attributes:
        values: [...] in logits; -inf where the token cannot be chosen, or nothing is.
        largest: [...] the largest magnitude among the logits of the same choice.
    """

    values: np.ndarray
    largest: np.ndarray

    def rounding(self, dtype: torch.dtype) -> np.ndarray:
        """Computes the largest margin [...] that another program's rounding in `dtype` may turn over."""
        if dtype == torch.float32:
            return np.full(self.values.shape, NEAR_TIE_LOGITS)
        return NEAR_TIE_SHARE * self.largest


def describe_rounding(dtype: torch.dtype) -> str:
    """Says what `Margins.rounding` is."""
    if dtype == torch.float32:
        return f"{NEAR_TIE_LOGITS:g} logits (float32)"
    return f"{NEAR_TIE_SHARE:.0%} of the largest logit ({str(dtype).removeprefix('torch.')})"


def margins(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Computes margin and largest magnitude, [n, 2].

    Args:
        logits: [n, V].
        tokens: [n] indices of logits; -1 for a token that has none.
    """
    logits = logits.float()
    own = logits.gather(-1, tokens.clamp_min(0)[:, None])
    others = logits.scatter(-1, tokens.clamp_min(0)[:, None], -torch.inf).amax(dim=-1)
    margin = torch.where(tokens >= 0, own[:, 0] - others, -torch.inf)
    return torch.stack([margin, logits.abs().amax(dim=-1)], dim=-1)


@torch.no_grad()
def verifier_margins(head: VerifierHead, response: Response, last: torch.Tensor) -> Margins:
    """Computes the verifier's margins of the m tokens of an answer, [m].

    Args:
        head: the verifier's final norm and head over its whole vocabulary, in float32.
        response: n tokens, prompt included.
        last: [n, H] the last layer's output before the final norm.
    """
    answer = torch.tensor(response.answer, dtype=torch.int64, device=last.device)
    # The state at place i - 1 yields the token at place i.
    states = last[response.prompt_length - 1 : len(response.tokens) - 1]
    step = max(1, CHUNKS[last.device.type].judged_elements // head.weight.shape[0])
    parts = [
        margins(head.logits(some.to(head.weight.dtype)), tokens)
        for some, tokens in zip(states.split(step), answer.split(step), strict=True)
    ]
    both = torch.cat(parts).cpu().numpy()
    return Margins(both[:, 0], both[:, 1])
