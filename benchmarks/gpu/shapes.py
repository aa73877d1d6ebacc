"""The shapes of real verifiers, from the config.json files that the tests keep."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.gpu.command import ROOT
from speculators.facts import VerifierFacts

FIXTURES = ROOT / "tests" / "fixtures"
# Sizes of a tiny verifier. The number of layers stays, since recipes name layers.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}


def facts_of(name: str, *, small: bool, **changes: Any) -> VerifierFacts:
    """Reads the facts of tests/fixtures/NAME, with tiny sizes if `small`, and with other changes."""
    file = FIXTURES / name / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    return VerifierFacts({**raw, **(SMALL if small else {}), **changes}, str(file))
