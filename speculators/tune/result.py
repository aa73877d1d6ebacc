"""The results of tuning, in process or for running servers: frozen values that are kept as JSON."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.bench.result import jsonable
from speculators.bench.speed import Speed
from speculators.servers.load import ServingSpeed
from speculators.structure.faults import FloatOrNaN

# Raised when the meaning of a result changes.
FORMAT = 1
DEFINITION = (
    "speed-up = tau / cost of a round; cost: seconds of a round / of a plain step, medians, all K in turn; "
    "interval: 95%, over prompts and over rounds; decoding only, without prefill"
)
# (first batch size, last, tokens drafted per round), both ends inclusive.
BatchRange = tuple[int, int, int]


@attrs.frozen(kw_only=True)
class CandidateK:
    """One K, with its predicted and perhaps its measured speed-up.

    Attributes:
        num_speculative_tokens: K.
        tau: exact, by replay.
        tau_interval: 95%, over prompts.
        draft_seconds: median of the drafter's time per round.
        verify_seconds: median of the verifier's time per round.
        cost: seconds of a round in plain steps.
        predicted: tau / cost.
        predicted_interval: 95%.
        chance_of_best: share of the draws in which this K has the greatest speed-up of all.
        measured: speed of real decoding against plain decoding, without prefill; None where it was not measured.
    """

    num_speculative_tokens: int
    tau: FloatOrNaN
    tau_interval: tuple[FloatOrNaN, FloatOrNaN]
    draft_seconds: float
    verify_seconds: float
    cost: float
    predicted: FloatOrNaN
    predicted_interval: tuple[FloatOrNaN, FloatOrNaN]
    chance_of_best: float
    measured: Speed | None = None

    @property
    def reliable(self) -> float | None:
        """The measured speed-up; None where it was not measured, or exceeds the acceptance length, its upper bound."""
        return None if self.measured is None or self.measured.unmatched_baseline else self.measured.speed_up


@attrs.frozen(kw_only=True)
class TuneResult:
    """The choice of K for decoding in process, one sequence at a time.

    Attributes:
        speculator: the run or folder.
        device: where rounds were timed, with `threads` CPU threads, in `dtype`.
        suite: the prompts' suite; `prompts_digest` is the hash of the replayed prompts.
        plain_seconds: median duration of a plain step.
        noise: interquartile range of plain steps / their median.
        cycles: number of timed rounds of each K.
        candidates: every K from 1, in order.
    """

    speculator: str
    verifier: str
    device: str
    threads: int
    dtype: str
    suite: str
    prompts: int
    prompts_digest: str
    temperature: float
    max_new_tokens: int
    seed: int
    plain_seconds: float
    noise: float
    cycles: int
    candidates: tuple[CandidateK, ...]
    definition: str = DEFINITION
    format: int = FORMAT

    @property
    def best(self) -> CandidateK:
        """The fastest K that was measured reliably; if there is none, the one with the greatest prediction."""
        measured = [each for each in self.candidates if each.reliable is not None]
        if measured:
            return max(measured, key=lambda each: each.reliable or 0.0)
        return max(self.candidates, key=lambda each: each.predicted)

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, NaN to null; `structure(document, TuneResult)` reads them back."""
        document: dict[str, Any] = jsonable(attrs.asdict(self))
        return document


@attrs.frozen(kw_only=True)
class DraftingPace:
    """The pace of a server with the speculator, under one load.

    Attributes:
        num_speculative_tokens: K that it was started with.
        in_flight: mean number of requests under way.
        round_seconds: mean time between a sequence's rounds.
        tau: acceptance length by the server's counters.
    """

    num_speculative_tokens: int
    in_flight: float
    round_seconds: float
    tau: float
    pace: ServingSpeed


@attrs.frozen(kw_only=True)
class LoadPoint:
    """The pace of all servers under one load.

    Attributes:
        concurrency: largest number of prompts under way at once.
        in_flight: mean number of requests under way on the server without drafts: less than `concurrency`, because
            the last answers end one by one.
        step_seconds: mean time between a sequence's tokens on that server.
        plain: the pace of that server.
        drafting: the servers that draft, by rising K.
    """

    concurrency: int
    in_flight: float
    step_seconds: float
    plain: ServingSpeed
    drafting: tuple[DraftingPace, ...]


@attrs.frozen(kw_only=True)
class BatchChoice:
    """The best K for one number of sequences.

    Attributes:
        batch: sequences that a server works on at once.
        num_speculative_tokens: K; 0 means no drafts.
        predicted: predicted throughput / throughput without drafts.
    """

    batch: int
    num_speculative_tokens: int
    predicted: float


@attrs.frozen(kw_only=True)
class ServedTuning:
    """The choice of K by load, for one kind of server.

    Attributes:
        speculator: the run or folder.
        engine: "vllm" or "sglang", in `version`.
        suite: the prompts' suite.
        taus: (K, exact acceptance length by replay) for each K that may be chosen.
        points: the measurements, by rising concurrency.
        choices: the best K at the measured loads: powers of two, and the largest load.
        schedule: the best K of every batch size up to the largest load, each batch size in one range.
        off_from: the batch size from which drafting does not pay; None if it pays up to the largest load.
    """

    speculator: str
    engine: str
    version: str
    suite: str
    temperature: float
    max_new_tokens: int
    taus: tuple[tuple[int, float], ...]
    points: tuple[LoadPoint, ...]
    choices: tuple[BatchChoice, ...]
    schedule: tuple[BatchRange, ...]
    off_from: int | None
    format: int = FORMAT

    @property
    def most(self) -> int:
        """The largest K of the schedule, with which a server is started; 0 if drafting never pays."""
        return max(k for _, _, k in self.schedule)

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values; `structure(document, ServedTuning)` reads them back."""
        document: dict[str, Any] = jsonable(attrs.asdict(self))
        return document
