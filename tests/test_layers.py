"""The house rules that a machine can check: imports point downwards, and no algorithm is named outside its folder."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors of the house, from the ground up; a room is a module or a package of speculators, each algorithm's folder
# is a room of its own.
FLOORS: list[tuple[str, ...]] = [
    ("errors", "registry", "events", "files", "chunks"),
    ("structure", "facts"),
    ("config",),
    ("recipe",),
    ("compat", "cpu", "drafter", "model", "contract", "init_from", "nn", "losses", "formats", "verifier"),
    ("models", "data", "decoding"),
    ("training", "bench"),
    ("servers",),
    ("tune",),
    ("runs", "tracking"),
    ("exchange",),
    ("pipeline",),
    ("cost", "inspection"),
    ("diff", "reproduce", "ablation"),
    ("doctor",),
    ("report",),
    ("api",),
    ("cli",),
]
LAYERS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# From here up, rooms of one floor must not import each other. Below they may, if modules form no cycle.
SIBLINGS_APART = LAYERS["models"]


def sources() -> dict[str, Path]:
    """Maps every module of the package from its dotted name to its file."""
    modules = {}
    for top, folder in (("speculators", ROOT / "speculators"), ("speculators.cli", ROOT / "cli")):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            modules[".".join((top, *(part for part in parts if part != "__init__")))] = file
    return modules


SOURCES = sources()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in SOURCES.items()}
ALGORITHMS = sorted(
    folder.name for folder in (ROOT / "speculators" / "models").iterdir() if (folder / "core.py").exists()
)


def imports(name: str) -> Iterator[tuple[int, str]]:
    """Yields (line, module) for every import of the package's own modules in a module, lazy imports included."""
    package = name if SOURCES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` imports the module; `from module import name` the module it names.
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in SOURCES else base for alias in node.names]
        else:
            continue
        yield from ((node.lineno, module) for module in names if module.partition(".")[0] == "speculators")


def room(module: str) -> str:
    """Names the room of a module: "training", or "models.NAME" for an algorithm's folder."""
    parts = module.split(".")[1:]
    if (
        len(parts) > 1
        and parts[0] == "models"
        and SOURCES.get(f"speculators.models.{parts[1]}", Path()).name == "__init__.py"
    ):
        return ".".join(parts[:2])
    return parts[0] if parts else ""


def layer(module: str) -> int:
    return LAYERS[room(module).partition(".")[0]]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "speculators"])
def test_imports_point_down_only(name: str) -> None:
    """A module imports only from lower layers and its own room, both at the top of the file and inside functions."""
    wrong = []
    for line, module in imports(name):
        if module == "speculators.models":
            continue  # holds no code, only the folders in which the registry looks; tested below
        above = layer(module) > layer(name)
        sibling = layer(module) == layer(name) >= SIBLINGS_APART and room(module) not in (room(name), "models")
        if module == "speculators" or above or sibling:
            wrong.append(f"{SOURCES[name].relative_to(ROOT)}:{line} imports {module}")
    assert wrong == []


def test_every_room_has_a_layer() -> None:
    """Every module of the package has a layer in the list above; a new one must be added."""
    assert {room(name).partition(".")[0] for name in SOURCES if name != "speculators"} <= set(LAYERS)


def test_modules_form_no_cycle() -> None:
    """Rooms of one lower layer may import each other, but no chain of imports leads back to its start."""
    graph = {name: {module for _, module in imports(name) if module in SOURCES} - {name} for name in SOURCES}
    graph["speculators"] = set()
    for name in graph:
        graph[name].discard("speculators.models")
    while ends := [name for name, imported in graph.items() if not imported & graph.keys()]:
        for name in ends:
            del graph[name]
    assert sorted(graph) == []


def test_the_package_of_algorithms_holds_no_code() -> None:
    """The registry can import the package to look for folders without loading anything else."""
    assert all(isinstance(node, ast.Expr) for node in TREES["speculators.models"].body)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in SOURCES
        if ("." in name and layer(name) <= LAYERS["recipe"]) or name.startswith("speculators.cli")
    ],
)
def test_the_light_layers_know_neither_torch_nor_rich(name: str) -> None:
    """Recipes and the command line start without loading heavy libraries."""
    heavy = {"torch", "transformers", "rich", "numpy", "datasets"}
    if name == "speculators.facts":
        # Inside a function, for files that omit what only transformers' classes say.
        heavy -= {"transformers"}
        assert not any(
            "transformers" in ast.dump(node) for node in TREES[name].body if isinstance(node, ast.ImportFrom)
        )
    imported = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.partition(".")[0])
    assert imported.isdisjoint(heavy)


def test_rich_is_known_to_the_report_alone() -> None:
    """Only the report room formats output with rich."""
    knows = {
        room(name)
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rich")
        or (isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "rich" for alias in node.names))
    }
    assert knows <= {"report"}


def texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, text) for every name and every string of a module, docstrings excepted."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node.lineno, text) for text in names)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_algorithm_is_named_outside_its_folder(algorithm: str) -> None:
    """Shared code calls hooks and never checks names, so that adding an algorithm edits no other file."""
    named = [
        f"{SOURCES[name].relative_to(ROOT)}:{line}: {text!r}"
        for name, tree in TREES.items()
        if room(name) != f"models.{algorithm}"
        for line, text in texts(tree)
        if re.search(algorithm, text, re.IGNORECASE)
    ]
    assert named == []
