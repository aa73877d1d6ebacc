"""Times rounds of every K on one sequence: K changes from round to round, in random order."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from speculators.bench.context import TimedPair
from speculators.bench.live import WARM_UP_TOKENS
from speculators.bench.rows import JudgedResponse
from speculators.decoding.loop import decode
from speculators.decoding.target import CachedVerifier
from speculators.drafter import Drafter, Proposal, chain
from speculators.errors import DataError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.recipe.token_filter import ALL_TOKENS, TokenFilter

# Rounds to time for each K. A cycle has one round of each.
CYCLES = 60
FEWEST_CYCLES = 5


@attrs.frozen(eq=False, kw_only=True)
class RoundTimes:
    """Times of n cycles; column K belongs to rounds that draft K tokens, column 0 to plain steps.

    Attributes:
        draft: [n, K_max + 1] seconds of `propose` and `advance`; 0 in column 0, where only plain decoding counts.
        verify: [n, K_max + 1] seconds of scoring and judging.
        drafted: [n, K_max + 1] tokens that were drafted, fewer than K where the drafter stopped early.
    """

    draft: np.ndarray
    verify: np.ndarray
    drafted: np.ndarray

    @property
    def noise(self) -> float:
        """The machine's noise: the interquartile range of plain steps / their median."""
        low, middle, high = np.quantile(self.verify[:, 0], [0.25, 0.5, 0.75])
        return float((high - low) / middle)

    def typical(self, seconds: np.ndarray, cycles: np.ndarray | None = None) -> np.ndarray:
        """Computes the typical seconds [K_max + 1] of a round: the median.

        A drafter that stops early has rounds of several lengths: their medians are averaged by the rounds of each.

        Args:
            seconds: [n, K_max + 1]
            cycles: indices of the cycles to use; None for all.
        """
        chosen = np.arange(len(seconds)) if cycles is None else cycles
        return np.array([_by_length(seconds[chosen, k], self.drafted[chosen, k]) for k in range(seconds.shape[1])])

    def costs(self, cycles: np.ndarray | None = None) -> np.ndarray:
        """Computes the duration [K_max + 1] of a round in plain steps; 1 in column 0."""
        seconds = self.typical(self.draft + self.verify, cycles)
        return np.asarray(seconds / seconds[0])


def time_rounds(
    pair: TimedPair,
    rows: Sequence[JudgedResponse],
    *,
    k_max: int,
    temperature: float,
    token_filter: TokenFilter = ALL_TOKENS,
    block_verification: bool = False,
    seed: int = 0,
    cycles: int = CYCLES,
    progress: Progress = ignore,
) -> RoundTimes:
    """Decodes in rounds whose K changes from one to the next, and times each round.

    A machine that slows down then slows the rounds of all K, and all K see the same lengths of context.

    Args:
        pair: speculator and verifier.
        rows: their prompts are decoded, each to at most the length of its response, until there are enough cycles.
        k_max: the largest K.
        temperature: of verifier and drafts.
        token_filter: tokens that the verifier samples from.
        block_verification: as of `decode`.
        seed: of the order of K, and of sampling.
        cycles: rounds to time for each K.
        progress: receives progress events.

    Raises:
        DataError: the responses are too short for a few cycles.
    """
    drafter = pair.model.draft()
    timed = _EveryK(drafter, pair.engine.device, _shuffled(k_max, seed))
    engine = CachedVerifier(pair.engine.model, drafter.target_layer_ids)
    generator = torch.Generator(pair.engine.device).manual_seed(seed)

    def run(row: JudgedResponse, length: int) -> None:
        prompt = torch.tensor(row.response.prompt, device=pair.engine.device)
        decode(
            engine,
            timed,
            prompt,
            max_new_tokens=length,
            num_tokens=k_max,
            temperature=temperature,
            token_filter=token_filter,
            block_verification=block_verification,
            generator=generator,
            stop_ids=frozenset(pair.engine.stop_ids),
        )

    run(rows[0], WARM_UP_TOKENS)
    timed.forget(_shuffled(k_max, seed))
    for row in rows:
        run(row, len(row.response.answer))
        done = len(timed.rounds) // (k_max + 1)
        progress(ProgressEvent(stage="costs", done=min(done, cycles), total=cycles, unit="rounds of each K"))
        if done >= cycles:
            break
    return _table(timed.rounds, k_max)


def _shuffled(k_max: int, seed: int) -> Iterator[int]:
    """Yields 0..k_max again and again, each time in a new order."""
    order = np.random.default_rng(seed)
    while True:
        yield from order.permutation(k_max + 1).tolist()


def _by_length(seconds: np.ndarray, drafted: np.ndarray) -> float:
    lengths, counts = np.unique(drafted, return_counts=True)
    medians = [float(np.median(seconds[drafted == length])) for length in lengths]
    return float(np.average(medians, weights=counts))


def _table(rounds: Sequence[_TimedRound], k_max: int) -> RoundTimes:
    """Sorts rounds into cycles, and leaves out the last one if it is incomplete."""
    size = k_max + 1
    cycles = len(rounds) // size
    if cycles < FEWEST_CYCLES:
        message = f"the responses have only {len(rounds)} rounds, and {FEWEST_CYCLES * size} are needed to time each K"
        raise DataError(message, hint="decode more prompts (--live), or consider fewer K (--k-max)")
    draft, verify, drafted = (np.zeros((cycles, size)) for _ in range(3))
    for index, each in enumerate(rounds[: cycles * size]):
        place = index // size, each.k
        # Plain decoding has no drafter whose state must advance.
        draft[place] = each.draft if each.k else 0.0
        verify[place] = each.verify
        drafted[place] = each.drafted
    return RoundTimes(draft=draft, verify=verify, drafted=drafted)


@attrs.define
class _TimedRound:
    """Seconds of one round."""

    k: int
    drafted: int
    draft: float
    verify: float = 0.0


class _EveryK:
    """A drafter that changes K from round to round, and times what happens between the decoder's calls."""

    def __init__(self, drafter: Drafter, device: torch.device, order: Iterator[int]) -> None:
        self.drafter = drafter
        self.target_layer_ids = drafter.target_layer_ids
        self.device = device
        self.forget(order)

    def forget(self, order: Iterator[int]) -> None:
        """Drops the times so far, and starts with a new order."""
        self.order = order
        self.rounds: list[_TimedRound] = []
        self._mark = 0.0

    def begin(self, tokens: torch.Tensor, hidden_states: torch.Tensor) -> Any:
        """Starts a sequence."""
        return self.drafter.begin(tokens, hidden_states)

    def propose(
        self, state: Any, *, num_tokens: int, temperature: float, generator: torch.Generator | None
    ) -> Proposal:
        """Drafts the next K of the order, whatever `num_tokens` says; nothing for K = 0."""
        k = next(self.order)
        self._lap()
        if k:
            proposal = self.drafter.propose(state, num_tokens=k, temperature=temperature, generator=generator)
        else:
            proposal = chain(torch.empty(0, dtype=torch.int64, device=self.device))
        self.rounds.append(_TimedRound(k, len(proposal.tokens), self._lap()))
        return proposal

    def advance(self, state: Any, tokens: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Records the verifier's time since the draft, and the time of the drafter's own update."""
        self.rounds[-1].verify = self._lap()
        self.drafter.advance(state, tokens, hidden_states)
        self.rounds[-1].draft += self._lap()

    def _lap(self) -> float:
        """Returns the seconds since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        return seconds
