"""Measures how on-policy the answers are: the verifier reads them and scores every supervised token."""

from __future__ import annotations

import math

import attrs
import numpy as np
import torch

from speculators.chunks import CHUNKS
from speculators.data.encoded import Conversations
from speculators.events import ProgressEvent
from speculators.inspection.lint import policy_verdict
from speculators.inspection.view import ConversationScore, OnPolicy
from speculators.pipeline.context import Context
from speculators.verifier.head import VerifierHead
from speculators.verifier.weights import load_head

STAGE = "on-policy"
# Places whose logits are in memory at once: 256 of a vocabulary of 152k are 156 MB in float32.
PLACES = 256


@attrs.frozen(eq=False)
class TokenScores:
    """The verifier's view of one conversation's n supervised tokens.

    Attributes:
        log_probability: [n] of the data's token, in nats.
        entropy: [n] of the verifier's distribution, in nats.
        agrees: [n] bool, the verifier's greedy token is the data's.
        ends: [n] bool, the token ends a turn.
    """

    log_probability: torch.Tensor
    entropy: torch.Tensor
    agrees: torch.Tensor
    ends: torch.Tensor


def spread(count: int, total: int) -> list[int]:
    """Chooses at most `count` indices below `total`, evenly spread from the first to the last."""
    return list(np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist())


def measure_on_policy(context: Context, prepared: Conversations, count: int) -> OnPolicy:
    """Scores `count` of the conversations, evenly spread over all; the verifier runs in the recipe's dtype."""
    dtype, device = context.recipe.verifier.dtype, context.world.device
    indices = spread(count, len(prepared))
    rows = [prepared.row(index) for index in indices]
    scores: dict[int, TokenScores] = {}
    with context.stage(STAGE) as stage:
        engine = context.engine(dtype)
        head = load_head(context.folder, context.plan.facts, dtype=engine.dtype).to(device)
        # With a head that was misread every number below would be wrong, and look like off-policy data.
        engine.check_head(head)
        ids = [torch.from_numpy(row.input_ids).long() for row in rows]
        for place, _, last in engine.capture_all(ids, (), batch_tokens=CHUNKS[device.type].capture_tokens):
            mask = torch.from_numpy(rows[place].loss_mask).to(device)
            scores[place] = score_tokens(head, last, ids[place].to(device), mask, ends=prepared.turn_ends)
            note = f"{sum(len(each.agrees) for each in scores.values()):,} supervised tokens"
            progress = ProgressEvent(stage=STAGE, done=len(scores), total=len(rows), unit="conversations", note=note)
            context.emit(progress)
        context.free_engine()
        names = prepared.ids()
        result = _summarise(dtype, [names[index] for index in indices], [scores[place] for place in range(len(rows))])
        stage.detail = f"{len(rows)} conversations, {result.tokens:,} supervised tokens"
    return result


@torch.no_grad()
def score_tokens(
    head: VerifierHead, last: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, *, ends: tuple[int, ...]
) -> TokenScores:
    """Scores the supervised tokens of one conversation, forming the logits of a few places at a time.

    Args:
        head: final norm and head, of the whole vocabulary.
        last: [n, H], output of the last layer, before the final norm.
        ids: [n] the conversation's tokens.
        mask: [n] bool, the supervised tokens; the first token is never among them.
        ends: tokens that end a turn.
    """
    places = mask.nonzero()[:, 0]
    log_probability, entropy, agrees = [], [], []
    for chunk in places.split(PLACES):
        # Token t is predicted from the state at t - 1.
        logs = head.logits(last[chunk - 1]).log_softmax(-1)  # [PLACES, V]
        log_probability.append(logs.gather(1, ids[chunk, None])[:, 0].cpu())
        agrees.append((logs.argmax(-1) == ids[chunk]).cpu())
        entropy.append(-(logs.exp() * logs).sum(-1).cpu())
    at_ends = torch.isin(ids[places], torch.tensor(ends, device=ids.device)).cpu()
    return TokenScores(torch.cat(log_probability), torch.cat(entropy), torch.cat(agrees), at_ends)


def _summarise(dtype: str, names: list[str], scores: list[TokenScores]) -> OnPolicy:
    # Means over all tokens of the sample in float64: a long conversation counts by its length.
    logs = torch.cat([each.log_probability for each in scores]).double()
    entropies = torch.cat([each.entropy for each in scores]).double()
    agrees = torch.cat([each.agrees for each in scores])
    at_ends = agrees[torch.cat([each.ends for each in scores])]
    agreement, mean, entropy = agrees.double().mean().item(), logs.mean().item(), entropies.mean().item()
    verdict, consequence = policy_verdict(agreement=agreement, excess=-mean - entropy)
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
        consequence=consequence,
        conversations=tuple(
            ConversationScore(
                name, len(each.agrees), each.log_probability.mean().item(), each.agrees.double().mean().item()
            )
            for name, each in zip(names, scores, strict=True)
        ),
    )
