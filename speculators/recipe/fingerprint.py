"""What identifies the input of a stage: its content, never a path or a name that the author chose."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.config import is_off
from speculators.files.remembered import remembered_sha256
from speculators.recipe.catalog import resolved_suite
from speculators.recipe.input_sections import DataSource, VerifierSection
from speculators.recipe.schema import Suite
from speculators.recipe.source_files import is_whole_file, locate_files


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hashes JSON values to 64 hex digits that do not depend on the order of keys."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def verifier_identity(section: VerifierSection) -> dict[str, Any]:
    """Identifies the verifier's weights, tokenizer and template."""
    kind = section.kind
    if kind == "hub":
        identity: dict[str, Any] = {"hub": section.model, "revision": section.revision}
    elif kind == "tiny":
        identity = {"tiny": section.model}
    elif kind == "folder":
        # Every file: another tokenizer or template changes the data, as other weights change the states.
        files = sorted(file for file in Path(section.model).iterdir() if file.is_file() and file.name[0] != ".")
        identity = {"files": {file.name: remembered_sha256(file) for file in files}}
    else:
        identity = {"sha256": section.sha256 or remembered_sha256(Path(section.model))}
    return {**identity, "trust_remote_code": section.trust_remote_code}


def template_identity(section: VerifierSection) -> dict[str, Any]:
    """Identifies what a recipe changes in the verifier's chat template; empty if it changes nothing."""
    identity: dict[str, Any] = {"template": section.template} if section.template else {}
    if section.chat_template is not None:
        identity["chat_template"] = remembered_sha256(Path(section.chat_template))
    return identity


def source_identity(source: DataSource) -> dict[str, Any]:
    """Identifies the conversations of a source; raises DataError if its files are not there.

    One file is identified by its content, several by their contents and the names that decide their order.
    """
    chosen: dict[str, Any] = {"split": source.split, "take": source.take}
    if source.map is not None:
        chosen["map"] = source.map.present()
    if not source.is_local:
        chosen |= {} if source.subset is None else {"subset": source.subset}
        return {"hub": source.path, "revision": source.revision, **chosen}
    path = Path(source.path)
    if is_whole_file(path):
        return {"sha256": remembered_sha256(path), **chosen}
    return {"files": {file.name: remembered_sha256(file.path) for file in locate_files(path, source.split)}, **chosen}


def file_hashes(identity: Mapping[str, Any]) -> Mapping[str, str]:
    """Reads the sha256 of each file off an identity: by name within a folder, "" for one file; {} for a hub's data."""
    return identity["files"] if "files" in identity else {"": identity["sha256"]} if "sha256" in identity else {}


def suite_source(suite: Suite) -> DataSource:
    """Names the files, or the data set, that a suite is read from."""
    return resolved_suite(suite).source


def suite_identity(suite: Suite) -> dict[str, Any]:
    """Identifies the prompts of a suite."""
    return source_identity(suite_source(suite))


def checkpoint_identity(folder: Path) -> dict[str, Any]:
    """Identifies a saved speculator by its config and its weights."""
    return {name: remembered_sha256(folder / name) for name in ("config.json", "model.safetensors")}


def code_identity(config_class: type) -> str | None:
    """Hashes a plug-in's own code; None for an algorithm of this package, which has a version instead."""
    module = config_class.__module__
    if module.startswith("speculators.models."):
        return None
    try:
        file = Path(inspect.getfile(config_class))
    except (OSError, TypeError):  # typed into an interpreter: it has no file
        return None
    # All files of a package: config.py says little about what core.py computes.
    files = sorted(file.parent.rglob("*.py")) if "." in module or file.name == "__init__.py" else [file]
    return fingerprint({str(path.relative_to(file.parent)): remembered_sha256(path) for path in files})


def section_values(section: Any, *leave_out: str) -> dict[str, Any]:
    """A section's fields as JSON values, without those named in `leave_out` and without options that are off."""
    values = attrs.asdict(section, filter=lambda field, value: field.name not in leave_out and not is_off(field, value))
    return dict(json.loads(json.dumps(values)))
