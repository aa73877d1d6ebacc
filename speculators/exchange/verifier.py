"""Where the verifier of what is exported is, if it is on this machine."""

from __future__ import annotations

from pathlib import Path

from speculators.errors import VerifierError
from speculators.recipe.input_sections import VerifierSection
from speculators.verifier import hub
from speculators.verifier.sources import existing_folder


def verifier_here(section: VerifierSection, named: str) -> Path | None:
    """Returns the folder of a verifier, with at least config and tokenizer; None where it is not on this machine.

    Args:
        section: the `[verifier]` of the run, with absolute paths.
        named: what config.json names: the folder that training used, which may be in another cache than this one.
    """
    held = _fetched(section) if section.kind == "hub" else existing_folder(section)
    return Path(named) if held is None and Path(named).is_dir() else held


def _fetched(section: VerifierSection) -> Path | None:
    try:
        return hub.fetch_tokenizer(section.model, section.revision, trust_remote_code=section.trust_remote_code)
    except VerifierError:  # told as not checked
        return None
