"""Restricts the tokens that a verifier may sample, as servers do, and reads a verifier's own generation config."""

from __future__ import annotations

import json
from typing import Any

import attrs

from speculators.errors import ArtifactError, Problem, RecipeError
from speculators.facts import VerifierFacts

GENERATION_CONFIG = "generation_config.json"


@attrs.frozen(kw_only=True)
class TokenFilter:
    """Restricts sampling to the more probable tokens; None leaves a restriction out.

    The restrictions apply in vLLM's order, `min_p`, `top_k`, `top_p`, each to the tokens that the one before has left.

    Attributes:
        min_p: least probability of a kept token, as a share of the most probable token's.
        top_k: number of the most probable tokens to keep.
        top_p: keeps the fewest most probable tokens that together have this probability.
    """

    min_p: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    @property
    def on(self) -> dict[str, float | int]:
        """The restrictions by name, in their order."""
        return attrs.asdict(self, filter=lambda _, value: value is not None)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in self.on.items())


ALL_TOKENS = TokenFilter()


def own_sampling(facts: VerifierFacts) -> dict[str, Any]:
    """Reads temperature and filters from a verifier's generation config, as values of `[benchmark]`.

    A file with filters alone means temperature 1, as for servers. Values that restrict nothing are left out.

    Raises:
        ArtifactError: the file cannot be read.
        RecipeError: the verifier has no such file, or the file says nothing of sampling.
    """
    if facts.folder is None:
        message = f"of {facts.source} only the config.json is known, not what its {GENERATION_CONFIG} says"
        raise _unknown(message, "name a config.json that lies beside it: --verifier-config FOLDER/config.json")
    file = facts.folder / GENERATION_CONFIG
    try:
        written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read: {error}") from None
    neutral: dict[str, tuple[float | None, ...]] = {"min_p": (None, 0), "top_k": (None, 0, -1), "top_p": (None, 1)}
    filters = {name: written[name] for name, off in neutral.items() if written.get(name) not in off}
    if written.get("temperature") is None and not filters:
        state = "says nothing of temperature, top_p, top_k or min_p" if file.is_file() else "does not exist"
        raise _unknown(f"{file} {state}", "write the numbers: temperature = [0.6], top_p = 0.95")
    temperature = written.get("temperature")
    values = {"temperature": [1.0 if temperature is None else temperature]}
    return values if temperature == 0 else values | filters


def _unknown(message: str, hint: str) -> RecipeError:
    return RecipeError([Problem("benchmark.temperature", f'"model": {message}', hint)])
