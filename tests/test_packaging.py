"""The wheel contains every package, and everything that the repository's front pages mention exists."""

from __future__ import annotations

import re
from pathlib import Path

import tomli

ROOT = Path(__file__).parent.parent
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAP = (ROOT / ".github" / "DEVELOPING.md").read_text(encoding="utf-8")
ROOMS = sorted(
    path.stem
    for path in (ROOT / "speculators").iterdir()
    if path.name != "__init__.py" and (path.suffix == ".py" or (path / "__init__.py").exists())
)


def test_every_package_is_listed():
    """Each folder with modules is in pyproject.toml's list: an editable install would hide that a wheel lacks it."""
    settings = PROJECT["tool"]["setuptools"]
    folders = {name: ROOT / place for name, place in settings["package-dir"].items()}
    packages = set()
    for name, folder in folders.items():
        for module in folder.rglob("*.py"):
            parts = module.parent.relative_to(folder).parts
            packages.add(".".join((name, *parts)))
    # Comparisons with other projects run from the repository and are not packaged.
    assert packages - set(settings["packages"]) == {"speculators.benchmarks.perf", "speculators.benchmarks.gpu"}


def test_the_lowest_versions_that_are_tested_are_those_that_are_admitted():
    """Every lower bound of a dependency is in .ci/lowest.txt, which CI installs."""
    lines = (ROOT / ".ci" / "lowest.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    required = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["quickstart"]
    lowest = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in required)
    assert tested.keys() == lowest.keys()
    assert [name for name, version in lowest.items() if not f"{tested[name]}.".startswith(f"{version}.")] == []


def test_the_map_and_the_readme_name_every_room():
    """Every room is in .github/DEVELOPING.md, and every folder also in the README's table."""
    assert [room for room in ROOMS if not re.search(rf"`{room}/?[*]?`", MAP)] == []
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2].partition("## ")[0]
    folders = [room for room in ROOMS if (ROOT / "speculators" / room).is_dir()]
    assert [folder for folder in folders if f"`{folder}`" not in table] == []


def test_every_file_on_the_map_exists():
    """Every file that the walk through a recipe names exists."""
    paths = set(re.findall(r"\b[a-z_]+/[a-z_/]+\.(?:py|toml|md|yml)\b", MAP.replace("ALGORITHM", "eagle3")))
    places = (ROOT, ROOT / "speculators", ROOT / ".github")
    assert [path for path in sorted(paths) if not any((place / path).exists() for place in places)] == []
