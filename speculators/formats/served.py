"""How a server reads speculators of one algorithm; an algorithm's `layouts.py` says it, `spec export` writes it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from speculators.formats.names import Names

VLLM, SGLANG = "vllm", "sglang"
# What `spec export --to` takes, and the server whose layout it is.
TARGETS = {"vllm": VLLM, "sglang": SGLANG, "speculators": VLLM, "hub": VLLM}


@attrs.frozen(kw_only=True)
class Place:
    """What a command that serves an export names.

    Attributes:
        folder: of the export.
        verifier: its folder, or its hub id.
        tokens: drafted a round (K).
    """

    folder: str
    verifier: str
    tokens: int


def vllm_serve(place: Place) -> tuple[str, ...]:
    """Returns the command for a folder whose config.json names algorithm, verifier and K: vLLM reads them from it."""
    return ("vllm", "serve", place.folder)


def vllm_draft(method: str) -> Callable[[Place], tuple[str, ...]]:
    """Returns what gives the command for a draft that vLLM is told about beside the verifier."""

    def command(place: Place) -> tuple[str, ...]:
        told = {"method": method, "model": place.folder, "num_speculative_tokens": place.tokens}
        return ("vllm", "serve", place.verifier, "--speculative-config", json.dumps(told))

    return command


def sglang_draft(algorithm: str) -> Callable[[Place], tuple[str, ...]]:
    """Returns what gives SGLang's command for a chain of drafts."""

    def command(place: Place) -> tuple[str, ...]:
        steps = {
            "model-path": place.verifier,
            "speculative-algorithm": algorithm,
            "speculative-draft-model-path": place.folder,
            "speculative-num-steps": str(place.tokens),
            "speculative-eagle-topk": "1",
            "speculative-num-draft-tokens": str(place.tokens + 1),
        }
        options = (part for name, value in steps.items() for part in (f"--{name}", value))
        return ("python", "-m", "sglang.launch_server", *options)

    return command


def _nothing(_: Any) -> list[str]:
    return []


@attrs.frozen(kw_only=True)
class Served:
    """How one server reads speculators of one algorithm.

    Attributes:
        server: VLLM or SGLANG.
        command: that serves an export.
        names: of the tensors; None for ours.
        left_out: beginnings of our names that the server takes from the verifier.
        config: gives its config.json, a dict of JSON values, from our config; None for ours.
        refusals: of a config that it would serve wrongly, each with the reason and the mend.
        notes: what whoever serves it should know.
        stitch: writes the whole export (speculator's folder, verifier's, new folder) where the draft becomes a part of
            a copy of the verifier; None for a folder of its own.
    """

    server: str
    command: Callable[[Place], tuple[str, ...]]
    names: Names | None = None
    left_out: tuple[str, ...] = ()
    config: Callable[[Any], dict[str, Any]] | None = None
    refusals: Callable[[Any], list[str]] = _nothing
    notes: Callable[[Any], list[str]] = _nothing
    stitch: Callable[[Path, Path, Path], Path] | None = None


def flat_decoder(decoder: dict[str, Any]) -> dict[str, Any]:
    """Returns `transformer_layer_config` as the top level of a config.json, its rotary embedding in the older keys too.

    Servers on transformers 4 read `rope_theta` and `rope_scaling`; transformers 5 turns them into `rope_parameters`.
    """
    rope = dict(decoder["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    plain = {key: value for key, value in decoder.items() if key not in ("rope_parameters", "layer_types")}
    return {**plain, "rope_theta": theta, "rope_scaling": scaling}
