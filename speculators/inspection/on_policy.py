"""How on-policy the answers are: the verifier reads them and tells what it would have said at supervised places."""

from __future__ import annotations

import math

import attrs
import numpy as np
import torch

from speculators.data.encoded import Conversations
from speculators.events import ProgressEvent
from speculators.inspection.lint import policy_verdict
from speculators.inspection.view import Measured, OnPolicy
from speculators.pipeline.context import Context
from speculators.verifier.capture import CAPTURE_TOKENS
from speculators.verifier.head import VerifierHead
from speculators.verifier.weights import load_head

STAGE = "on-policy"
# Logits in memory at once: 256 places of a vocabulary of 152k are 156 MB in float32.
PLACES = 256


@attrs.frozen(eq=False)
class Opinion:
    """The verifier on a conversation's supervised tokens, each [n]; `ends` tells which of them end a turn."""

    log_probability: torch.Tensor
    entropy: torch.Tensor
    agrees: torch.Tensor
    ends: torch.Tensor


def on_policy(context: Context, prepared: Conversations, count: int) -> OnPolicy:
    """Measures `count` of the conversations, evenly spread over all; the verifier runs in the recipe's dtype."""
    dtype, device = context.recipe.verifier.dtype, context.world.device
    chosen = np.unique(np.linspace(0, len(prepared) - 1, min(count, len(prepared))).round().astype(int)).tolist()
    rows = [prepared.row(index) for index in chosen]
    opinions: dict[int, Opinion] = {}
    with context.stage(STAGE) as words:
        engine = context.engine(dtype)
        head = load_head(context.folder, context.plan.facts, dtype=engine.dtype).to(device)
        # Of a head that was misread every number below would be wrong, and look like off-policy data.
        engine.check_head(head)
        ids = [torch.from_numpy(row.input_ids).long() for row in rows]
        for place, _, last in engine.capture_all(ids, (), batch_tokens=CAPTURE_TOKENS[device.type]):
            mask = torch.from_numpy(rows[place].loss_mask).to(device)
            opinions[place] = opinion(head, last, ids[place].to(device), mask, ends=prepared.turn_ends)
            note = f"{sum(len(one.agrees) for one in opinions.values()):,} supervised tokens"
            progress = ProgressEvent(stage=STAGE, done=len(opinions), total=len(rows), unit="conversations", note=note)
            context.tell(progress)
        context.free_engine()
        names = prepared.ids()
        result = _result(dtype, [names[index] for index in chosen], [opinions[place] for place in range(len(rows))])
        words.append(f"{len(rows)} conversations, {result.tokens:,} supervised tokens")
    return result


@torch.no_grad()
def opinion(
    head: VerifierHead, last: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, *, ends: tuple[int, ...]
) -> Opinion:
    """Returns what the verifier says at the supervised places; the logits are formed a few places at a time.

    Args:
        head: final norm and head, of the whole vocabulary.
        last: [n, H], what leaves the last layer, before the final norm.
        ids: [n] the conversation's tokens.
        mask: [n] which of them are supervised; never the first.
        ends: tokens that end a turn.
    """
    places = mask.nonzero()[:, 0]
    log_probability, entropy, agrees = [], [], []
    for chunk in places.split(PLACES):
        # Token t is predicted from the state at t - 1.
        logs = head.logits(last[chunk - 1]).log_softmax(-1)
        log_probability.append(logs.gather(1, ids[chunk, None])[:, 0].cpu())
        agrees.append((logs.argmax(-1) == ids[chunk]).cpu())
        entropy.append(-(logs.exp() * logs).sum(-1).cpu())
    said = torch.isin(ids[places], torch.tensor(ends, device=ids.device)).cpu()
    return Opinion(torch.cat(log_probability), torch.cat(entropy), torch.cat(agrees), said)


def _result(dtype: str, names: list[str], opinions: list[Opinion]) -> OnPolicy:
    logs = torch.cat([one.log_probability for one in opinions]).double()
    entropies = torch.cat([one.entropy for one in opinions]).double()
    agrees = torch.cat([one.agrees for one in opinions])
    at_ends = agrees[torch.cat([one.ends for one in opinions])]
    agreement, mean, entropy = agrees.double().mean().item(), logs.mean().item(), entropies.mean().item()
    verdict, words = policy_verdict(agreement=agreement, excess=-mean - entropy)
    return OnPolicy(
        dtype=dtype,
        tokens=len(logs),
        log_probability=mean,
        perplexity=math.exp(-mean),
        entropy=entropy,
        agreement=agreement,
        ends=len(at_ends),
        ends_agreement=at_ends.double().mean().item() if len(at_ends) else None,
        verdict=verdict,
        words=words,
        conversations=tuple(
            Measured(name, len(one.agrees), one.log_probability.mean().item(), one.agrees.double().mean().item())
            for name, one in zip(names, opinions, strict=True)
        ),
    )
