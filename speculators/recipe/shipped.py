"""Reads what ships with the recipes: their locks and their verifiers' config.json; `spec validate` needs no more."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from speculators.errors import LockError
from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipes_folder
from speculators.recipe.fingerprint import verifier_identity
from speculators.recipe.input_sections import VerifierSection

FORMAT = 1
NAME = "locks.json"


def read_locks() -> dict[str, Any]:
    """Reads the shipped locks: each verifier's config.json, and the inputs of each recipe's stages."""
    file = recipes_folder() / NAME
    try:
        locks = json.loads(file.read_text(encoding="utf-8"))
        if locks["format"] != FORMAT:
            raise LockError(f"{file}: format {locks['format']}, but this version reads format {FORMAT}")
        return {"format": FORMAT, "verifiers": dict(locks["verifiers"]), "recipes": dict(locks["recipes"])}
    except FileNotFoundError:
        return {"format": FORMAT, "verifiers": {}, "recipes": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LockError(f"{file}: damaged: {error!r}", hint="git checkout restores it") from error


def shipped_facts(section: VerifierSection) -> VerifierFacts | None:
    """Looks up a verifier's config.json in the shipped locks; None if they have another revision of it, or none."""
    locks = read_locks()
    if section.model not in locks["verifiers"]:
        return None
    same = any(identifies(section, lock["inputs"]["verifier"]) for lock in locks["recipes"].values())
    return VerifierFacts(locks["verifiers"][section.model], f"{NAME}: {section.model}") if same else None


def identifies(section: VerifierSection, inputs: Mapping[str, Any]) -> bool:
    """Whether these inputs of a stage `verifier` belong to this verifier; False if only its files could show that."""
    if section.kind == "folder" or (section.kind == "gguf" and section.sha256 is None):
        return False
    identity = verifier_identity(section)
    return all(inputs.get(key) == value for key, value in identity.items() if key != "trust_remote_code")
