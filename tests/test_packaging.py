"""What the wheel holds."""

from __future__ import annotations

from pathlib import Path

import tomli

ROOT = Path(__file__).parent.parent


def test_every_package_is_listed():
    """Each folder with modules is in pyproject.toml's list: an editable install hides one that a wheel would lack."""
    settings = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(settings["packages"])
    folders = {name: ROOT / place for name, place in settings["package-dir"].items()}
    found = set()
    for name, folder in folders.items():
        for module in folder.rglob("*.py"):
            parts = module.parent.relative_to(folder).parts
            found.add(".".join((name, *parts)))
    assert found - listed == {"speculators.benchmarks.perf"}  # harnesses are run from the repository
