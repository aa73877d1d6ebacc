"""Fixtures: the tiny verifier with conversations of its own, to compare checkpoints on, and a finished smoke run."""

from models.conftest import world
from pipeline.conftest import run_folder, smoke, spec

__all__ = ["run_folder", "smoke", "spec", "world"]
