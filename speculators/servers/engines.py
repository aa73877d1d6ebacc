"""Which inference engines there are, the names of their metrics, and what a running server says about itself."""

from __future__ import annotations

from typing import Any

import attrs

from speculators.errors import ServerError
from speculators.servers.endpoint import Endpoint

MODELS = "/v1/models"


@attrs.frozen(kw_only=True)
class EngineMetrics:
    """Names of an engine's counters in /metrics, without `_total`; None where the engine has no such counter.

    Attributes:
        name: value of `--engine`.
        generated: tokens of all answers.
        rounds: verifications of a draft.
        drafted: drafted tokens.
        accepted: accepted draft tokens.
        by_position: accepted draft tokens, with a label `position` that starts at 0.
        version: (path, key) of the engine's version.
        enable: how to start the server so that it counts.
    """

    name: str
    generated: str
    rounds: str
    drafted: str | None
    accepted: str | None
    by_position: str | None
    version: tuple[str, str]
    enable: str


ENGINES = {
    engine.name: engine
    for engine in (
        EngineMetrics(
            name="vllm",
            generated="vllm:generation_tokens",
            rounds="vllm:spec_decode_num_drafts",
            drafted="vllm:spec_decode_num_draft_tokens",
            accepted="vllm:spec_decode_num_accepted_tokens",
            by_position="vllm:spec_decode_num_accepted_tokens_per_pos",
            version=("/version", "version"),
            enable="vllm serve counts them unless it is started with --disable-log-stats",
        ),
        EngineMetrics(
            name="sglang",
            generated="sglang:generation_tokens",
            rounds="sglang:spec_verify_calls",
            drafted=None,
            accepted=None,
            by_position=None,
            version=("/get_server_info", "version"),
            enable="start sglang.launch_server with --enable-metrics, in a version that counts verify calls; the gauge "
            "spec_accept_length is a short moving average, which a benchmark cannot use",
        ),
    )
}


@attrs.frozen(kw_only=True)
class ServerIdentity:
    """What a server says about itself. Runs record these fields in `served.json` and beside regenerated answers.

    Attributes:
        engine: the owner of the model as the server names it: "vllm", "sglang", ...
        version: of the engine; "" if the server does not report it.
        model: the name that requests must use.
        root: where the server loaded the model from; "" if it does not report it.
        max_model_len: tokens of prompt and answer together; None if it does not report it.
    """

    engine: str
    version: str
    model: str
    root: str
    max_model_len: int | None

    @classmethod
    def at(cls, endpoint: Endpoint) -> ServerIdentity:
        """Asks a server; raises ServerError if it cannot be reached or serves no model."""
        first = list_models(endpoint)[0]
        return cls(
            engine=str(first.get("owned_by") or ""),
            # Only vLLM serves this path.
            version=read_version(endpoint, "/version", "version") or "",
            model=str(first["id"]),
            root=str(first.get("root") or ""),
            max_model_len=first.get("max_model_len"),
        )


def list_models(endpoint: Endpoint) -> list[dict[str, Any]]:
    """Fetches the entries of /v1/models, at least one, each with an "id"; raises ServerError if there is none."""
    listing = endpoint.get(MODELS)
    models = listing.get("data") if isinstance(listing, dict) else None
    entries = models if isinstance(models, list) else []
    if not entries or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
        raise ServerError(f"{endpoint.url}{MODELS}: lists no model", hint="is it an OpenAI-compatible server?")
    return entries


def read_version(endpoint: Endpoint, path: str, key: str) -> str | None:
    """Fetches an engine's version; None if the server has no such path or key."""
    try:
        document = endpoint.get(path)
    except ServerError:
        return None
    version = document.get(key) if isinstance(document, dict) else None
    return None if version is None else str(version)
