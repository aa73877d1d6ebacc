"""Looks up the layouts of an algorithm: the optional `layouts.py` beside its `config.py`."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.formats.published import PublishedCheckpoint, PublishedFormat
from speculators.formats.server_layout import ServerLayout


def layouts_of(algorithm: str) -> tuple[ServerLayout, ...]:
    """Lists the servers that read an algorithm's speculators; empty where its folder names none."""
    return _declared(algorithm, "SERVER_LAYOUTS")


def formats_of(algorithm: str) -> tuple[PublishedFormat, ...]:
    """Lists the published formats that an algorithm's speculators come in."""
    return _declared(algorithm, "PUBLISHED_FORMATS")


def matching_formats(source: PublishedCheckpoint) -> list[tuple[str, PublishedFormat]]:
    """Tries every format of every algorithm on a checkpoint and returns (algorithm, format) of those that match."""
    return [(name, each) for name in CONFIGS.names() for each in formats_of(name) if each.fits(source)]


def _declared(algorithm: str, constant: str) -> tuple[Any, ...]:
    package = SpeculatorModelConfig.get_class(algorithm).__module__.rpartition(".")[0]
    if not package or importlib.util.find_spec(f"{package}.layouts") is None:
        return ()
    return tuple(getattr(importlib.import_module(f"{package}.layouts"), constant))
