"""What a benchmark on a running server says: frozen values, the definition beside every number, JSON."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.bench.result import jsonable
from speculators.servers.load import Pace

# Raised when what a result holds changes.
FORMAT = 1


@attrs.frozen(kw_only=True)
class ServedAcceptance:
    """Acceptance as the server counts it.

    Attributes:
        prompts: distinct prompts; `responses`, the answers to all their turns.
        tokens: emitted by rounds: those of the answers without the first of each.
        rounds: the server's verifications.
        tau: tokens / rounds.
        tau_interval: 95%, bootstrap over prompts; None where the rounds of single prompts cannot be told apart.
        drafted: mean tokens drafted a round; None where the server does not tell.
        by_position: share of rounds that accepted their j-th draft, drafts past an answer's end counted; () likewise.
        undrafted: rounds without a draft, of `rounds`.
    """

    prompts: int
    responses: int
    tokens: float
    rounds: float
    tau: float
    tau_interval: tuple[float, float] | None
    drafted: float | None
    by_position: tuple[float, ...]
    undrafted: float


@attrs.frozen(kw_only=True)
class ServedSetting:
    """The numbers of one (suite, K, T).

    Attributes:
        prompts_digest: of the prompts that were asked, `prompt_ids`; `suite_digest`, of the suite that they are from.
        by_prompt: tokens and rounds of each prompt; None where they cannot be told apart.
        pace: of the server that drafts; `baseline`, of the one that does not, None without one.
        speed_up: tokens a second, with over without.
        unmatched_baseline: the speed-up exceeds tau, which no fair comparison can.
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
    pace: Pace
    baseline: Pace | None
    speed_up: float | None
    unmatched_baseline: bool


@attrs.frozen(kw_only=True)
class ServedResult:
    """One benchmark of a speculator on a running server.

    Attributes:
        speculator: whose run it is filed in, or the folder; what is really served only the server knows.
        engine: and its version, as it says; `model`, as it calls what it serves.
        endpoint: its address; `baseline_endpoint`, of the server without a speculator, of the
            same version, which calls its model `baseline_model`.
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
        """Returns JSON values; what is not a number is null."""
        document: dict[str, Any] = jsonable(attrs.asdict(self))
        return document
