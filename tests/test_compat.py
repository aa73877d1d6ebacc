"""One module hides the differences between the supported versions of torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from speculators import compat


@dataclass
class OldConfig:
    """The parts of torch 2.11's LaunchConfig that matter here."""

    min_nodes: int


@dataclass
class NewConfig(OldConfig):
    """The parts of torch 2.13's LaunchConfig that matter here."""

    shutdown_timeout: int | None = None


def test_processes_get_the_time_that_the_caller_asks_for(monkeypatch: pytest.MonkeyPatch):
    """Where torch lets a launcher wait for its processes, it waits as long as asked."""
    monkeypatch.setattr(compat, "LaunchConfig", NewConfig)
    assert compat.launch_config(shutdown_seconds=600, min_nodes=1) == NewConfig(1, shutdown_timeout=600)


def test_a_torch_without_that_option_launches_all_the_same(monkeypatch: pytest.MonkeyPatch):
    """An option that torch 2.11 does not know is left out."""
    monkeypatch.setattr(compat, "LaunchConfig", OldConfig)
    assert compat.launch_config(shutdown_seconds=600, min_nodes=1) == OldConfig(1)
