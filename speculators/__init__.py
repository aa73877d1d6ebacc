"""The public names of the package, for plug-ins, notebooks and scripts; each is imported when it is first used.

`import speculators` alone loads neither torch nor a config, which keeps the command line quick. Plug-ins may also rely
on `speculators.{config, model, drafter, losses}`, `speculators.models.{chains, base_components}` and `speculators.nn`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Type checkers and editors read the names here; `_HOMES` says the same to the interpreter, and a test compares the two.
if TYPE_CHECKING:
    from speculators.api import (
        Answer,
        DraftedTokens,
        Run,
        Speculator,
        decode,
        draft,
        load_recipe,
        load_speculator,
        make_plan,
        read_run,
        replay,
        run_recipe,
    )
    from speculators.config import (
        ProposalConfig,
        SpeculatorModelConfig,
        SpeculatorsConfig,
        VerifierConfig,
        derived,
        knob,
    )
    from speculators.drafter import Drafter, Proposal
    from speculators.errors import SpeculatorsError
    from speculators.facts import VerifierFacts
    from speculators.model import SpeculatorModel

__all__ = [
    "Answer",
    "DraftedTokens",
    "Drafter",
    "Proposal",
    "ProposalConfig",
    "Run",
    "Speculator",
    "SpeculatorModel",
    "SpeculatorModelConfig",
    "SpeculatorsConfig",
    "SpeculatorsError",
    "VerifierConfig",
    "VerifierFacts",
    "decode",
    "derived",
    "draft",
    "knob",
    "load_recipe",
    "load_speculator",
    "make_plan",
    "read_run",
    "replay",
    "run_recipe",
]

_HOMES = {
    "api": (
        "Answer",
        "DraftedTokens",
        "Run",
        "Speculator",
        "decode",
        "draft",
        "load_recipe",
        "load_speculator",
        "make_plan",
        "read_run",
        "replay",
        "run_recipe",
    ),
    "config": (
        "ProposalConfig",
        "SpeculatorModelConfig",
        "SpeculatorsConfig",
        "VerifierConfig",
        "derived",
        "knob",
    ),
    "drafter": ("Drafter", "Proposal"),
    "errors": ("SpeculatorsError",),
    "facts": ("VerifierFacts",),
    "model": ("SpeculatorModel",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"speculators.{module}"), name)
            globals()[name] = value  # the next access does not come here
            return value
    raise AttributeError(f"module 'speculators' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
