"""The result of a benchmark on a running server: frozen values, the definition beside every number, in JSON."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.bench.result import jsonable
from speculators.servers.load import ServingSpeed
from speculators.structure.faults import FloatOrNaN

# Raised when the meaning of a result changes.
FORMAT = 1


@attrs.frozen(kw_only=True)
class ServedAcceptance:
    """Acceptance by the server's own counters.

    Attributes:
        prompts: distinct prompts.
        responses: answers to all turns of the prompts.
        tokens: tokens emitted by rounds: those of the answers, without the first of each.
        rounds: the server's verifications.
        tau: tokens / rounds.
        tau_interval: 95%, bootstrap over prompts; None where rounds cannot be assigned to prompts.
        drafted: mean tokens drafted per round; None where the server does not report it.
        by_position: share of rounds that accepted their j-th draft, including drafts past the end of an answer; empty
            where the server does not report it.
        undrafted: rounds without a draft, included in `rounds`.
    """

    prompts: int
    responses: int
    tokens: float
    rounds: float
    tau: FloatOrNaN
    tau_interval: tuple[FloatOrNaN, FloatOrNaN] | None
    drafted: float | None
    by_position: tuple[FloatOrNaN, ...]
    undrafted: float


@attrs.frozen(kw_only=True)
class ServedSetting:
    """The numbers of one (suite, K, T).

    Attributes:
        prompts_digest: of the prompts that were sent.
        prompt_ids: their ids.
        suite_digest: of all prompts of the suite.
        definition: how tau is counted, K, T and engine, in one line.
        by_prompt: (tokens, rounds) of each prompt; None where rounds cannot be assigned to prompts.
        pace: of the server that drafts.
        baseline: pace of the server that does not; None without one.
        speed_up: tokens per second with drafts / without.
        unmatched_baseline: whether the speed-up exceeds tau, which is impossible in a fair comparison.
    """

    suite: str
    prompts_digest: str
    prompt_ids: tuple[str, ...]
    suite_digest: str
    num_speculative_tokens: int
    temperature: float
    definition: str
    acceptance: ServedAcceptance
    by_prompt: dict[str, tuple[float, float]] | None
    pace: ServingSpeed
    baseline: ServingSpeed | None
    speed_up: float | None
    unmatched_baseline: bool

    @property
    def key(self) -> tuple[str, int, float]:
        """(suite, K, T)."""
        return self.suite, self.num_speculative_tokens, self.temperature


@attrs.frozen(kw_only=True)
class ServedResult:
    """One benchmark of a speculator on a running server.

    Attributes:
        speculator: the run it is filed in, or a folder; only the server knows what it really serves.
        engine: "vllm" or "sglang".
        version: of the engine, as the server reports it.
        model: the server's name for what it serves.
        endpoint: address of the server.
        baseline_endpoint: address of a server of the same version without a speculator; None without one.
        baseline_model: its name for what it serves.
        concurrency: prompts under way at once.
        seed: of sampling and of the bootstrap.
    """

    speculator: str
    verifier: str
    engine: str
    version: str
    model: str
    endpoint: str
    baseline_endpoint: str | None
    baseline_model: str | None
    concurrency: int
    max_new_tokens: int
    seed: int
    settings: tuple[ServedSetting, ...]
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, NaN to null; `structure(document, ServedResult)` reads them back."""
        document: dict[str, Any] = jsonable(attrs.asdict(self))
        return document
