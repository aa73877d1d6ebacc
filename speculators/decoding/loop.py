"""Decodes one sequence round by round; without a drafter this is plain decoding by the same engine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Sequence

import attrs
import torch

from speculators.decoding.target import CachedVerifier
from speculators.decoding.verify import verify
from speculators.drafter import Drafter
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter

# Called with the tokens of the response as they come, and how many of them, from the first, are accepted drafts.
OnTokens = Callable[[Sequence[int], int], None]


def unheard(tokens: Sequence[int], accepted: int) -> None:
    """Drops the tokens; for callers that wait for the whole response."""


@attrs.frozen
class Round:
    """One draft and one verification.

    Attributes:
        anchor: index in the response of the last token that was known when the round began.
        drafted: number of tokens proposed.
        accepted: number of them that were emitted; drafts past the end of the response do not count.
        emitted: accepted drafts and the verifier's own token, up to the end of the response.
    """

    anchor: int
    drafted: int
    accepted: int
    emitted: int


@attrs.frozen(kw_only=True)
class Decoded:
    """A response and the time it took.

    Attributes:
        tokens: of the response; the first comes from the prefill and belongs to no round.
        rounds: in order; those of plain decoding draft nothing.
        seconds: wall clock of the whole response, prefill included.
        prefill_seconds: time until the first token was known.
        draft_seconds: time of `propose` and `advance` in the rounds.
        verify_seconds: time of the verifier in the rounds: scoring, and judging the drafts.
    """

    tokens: tuple[int, ...]
    rounds: tuple[Round, ...]
    seconds: float
    prefill_seconds: float
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


@attrs.define
class _Clock:
    """Books wall-clock seconds by activity, from the moment it is made."""

    device: torch.device
    spent: dict[str, float] = attrs.field(init=False, factory=lambda: {"draft": 0.0, "verify": 0.0, "other": 0.0})
    _mark: float = attrs.field(init=False, factory=time.perf_counter)

    def lap(self, activity: str) -> None:
        """Books the time since the last call on `activity`."""
        if self.device.type == "cuda":
            # A drafter's kernels may still run when it returns; without waiting they would count as the verifier's.
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.spent[activity] += now - self._mark
        self._mark = now


@torch.inference_mode()
def decode(
    verifier: CachedVerifier,
    drafter: Drafter | None,
    prompt: torch.Tensor,
    *,
    max_new_tokens: int,
    num_tokens: int = 0,
    temperature: float = 0.0,
    token_filter: TokenFilter = ALL_TOKENS,
    block_verification: bool = False,
    generator: torch.Generator | None = None,
    stop_ids: Collection[int] = (),
    listen: OnTokens = unheard,
    longest: int = 0,
) -> Decoded:
    """Continues a prompt.

    Args:
        verifier: records the hidden states that the drafter reads.
        drafter: None decodes plainly, one token per round.
        prompt: [n] int64.
        max_new_tokens: length of the response at most.
        num_tokens: tokens drafted per round (K), also in the last one, whose surplus is cut off after verification.
        temperature: 0 is greedy.
        token_filter: tokens that the verifier samples from at a temperature above 0.
        block_verification: judges a round's drafts as a block instead of token by token.
        generator: source of all randomness at a temperature above 0.
        stop_ids: the response ends with the first of these, which stays in it.
        listen: receives the tokens as they come; its time is counted in no activity but the response's.
        longest: as of `CachedVerifier.prefill`, where the answer is cut at fewer tokens than it could have.
    """
    judge = functools.partial(
        verify,
        temperature=temperature,
        token_filter=token_filter,
        block_verification=block_verification,
        generator=generator,
    )
    clock = _Clock(verifier.device)
    logits, states = verifier.prefill(prompt, longest=max(longest, len(prompt) + max_new_tokens))
    # The prefill's logits give the first token, which no draft precedes.
    first = judge(logits[None], None).token
    clock.lap("other")
    prefill_seconds = clock.spent["other"]
    tokens, rounds = [first], []
    listen(tokens, 0)
    state = None
    if drafter is not None:
        state = drafter.begin(torch.cat([prompt.to(verifier.device), _tensor([first], verifier)]), states)
    while len(tokens) < max_new_tokens and tokens[-1] not in stop_ids:
        proposal = None
        clock.lap("other")
        if drafter is not None:
            proposal = drafter.propose(state, num_tokens=num_tokens, temperature=temperature, generator=generator)
            clock.lap("draft")
        logits, states = verifier.score(tokens[-1], proposal)
        verification = judge(logits, proposal)
        accepted = [] if proposal is None else proposal.tokens[list(verification.path)].tolist()
        # Only the accepted path's keys stay, so that the next round starts from verified tokens.
        verifier.keep(verification.path)
        clock.lap("verify")
        outcome = [*accepted, verification.token]
        emitted = _until_end(outcome, max_new_tokens - len(tokens), stop_ids)
        drafted = 0 if proposal is None else len(proposal.tokens)
        # Counts only what the response keeps, so that acceptance is not inflated past its end.
        rounds.append(Round(len(tokens) - 1, drafted, min(len(accepted), len(emitted)), len(emitted)))
        tokens += emitted
        listen(emitted, rounds[-1].accepted)
        if drafter is not None:
            # States of the places before each emitted token: the scored token's, then those of the accepted nodes.
            # Tokens cut off the last round are left out: they are no part of the response, which a drafter may
            # remember.
            rows = [0, *(node + 1 for node in verification.path)][: len(emitted)]
            drafter.advance(state, _tensor(emitted, verifier), states[rows])
            clock.lap("draft")
    clock.lap("other")
    return Decoded(
        tokens=tuple(tokens),
        rounds=tuple(rounds),
        seconds=sum(clock.spent.values()),
        prefill_seconds=prefill_seconds,
        draft_seconds=clock.spent["draft"],
        verify_seconds=clock.spent["verify"],
    )


def _until_end(tokens: list[int], room: int, stop_ids: Collection[int]) -> list[int]:
    for index, token in enumerate(tokens[:room]):
        if token in stop_ids:
            return tokens[: index + 1]
    return tokens[:room]


def _tensor(tokens: list[int], verifier: CachedVerifier) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64, device=verifier.device)
