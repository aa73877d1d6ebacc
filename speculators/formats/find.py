"""The layouts of algorithms: `layouts.py` beside an algorithm's config, if there is one."""

from __future__ import annotations

import importlib
import importlib.util

from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.formats.foreign import Foreign, Source
from speculators.formats.served import Served


def served_by(algorithm: str) -> tuple[Served, ...]:
    """Returns how servers read speculators of an algorithm; none where it does not say."""
    return _told(algorithm, "SERVED")


def formats_of(algorithm: str) -> tuple[Foreign, ...]:
    """Returns the formats that speculators of an algorithm come in."""
    return _told(algorithm, "FOREIGN")


def fitting(source: Source) -> list[tuple[str, Foreign]]:
    """Returns (algorithm, format) of all that a source could be."""
    return [(name, each) for name in CONFIGS.names() for each in formats_of(name) if each.fits(source)]


def _told(algorithm: str, what: str) -> tuple:
    package = SpeculatorModelConfig.get_class(algorithm).__module__.rpartition(".")[0]
    if not package or importlib.util.find_spec(f"{package}.layouts") is None:
        return ()
    return tuple(getattr(importlib.import_module(f"{package}.layouts"), what))
