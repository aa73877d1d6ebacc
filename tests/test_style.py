"""House style that a machine can check: names that say what they hold, plain English, one class per name."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("speculators", "cli", "benchmarks")
TREES = {
    file: ast.parse(file.read_text(encoding="utf-8"))
    for folder in (*FOLDERS, "tests")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if file != Path(__file__)
}
PRODUCT = {file: tree for file, tree in TREES.items() if file.relative_to(ROOT).parts[0] in FOLDERS}

# Names that could hold anything: once a bool, a str, a list and logits were all called `told`.
VAGUE = {"told", "held", "found", "words", "wanted", "given", "here", "wish", "looked", "said"}
# Phrases that a native writer does not use.
PHRASES = re.compile(
    r"\btold\b|\btells? (of|what)\b|(?<!there )\bis no (integer|number|folder|file|run|table|recipe|error)\b"
    r"|(?<=\. )Of (a|the|which|those)\b|^Of (a|the|which|those)\b|\bhas it\b",
    re.MULTILINE,
)


def place(file: Path, line: int) -> str:
    return f"{file.relative_to(ROOT)}:{line}"


def bound_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, name) of each variable, parameter, attribute, function and class that a module binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of each string and each comment of a module."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("#"):
            yield number, line.lstrip("# ")


def test_names_say_what_they_hold() -> None:
    """No variable, parameter, attribute or function has a name that could hold anything."""
    vague = [
        f"{place(file, line)}: {name}"
        for file, tree in PRODUCT.items()
        for line, name in bound_names(tree)
        if name.strip("_") in VAGUE
    ]
    assert vague == []


def test_texts_are_plain_english() -> None:
    """Messages, docstrings and comments, those of tests included, avoid phrases that no native writer uses."""
    odd = [
        f"{place(file, line)}: {match[0]!r}"
        for file in TREES
        for line, text in texts(file)
        for match in PHRASES.finditer(text)
    ]
    assert odd == []


def test_one_class_one_name() -> None:
    """A public class name exists once, so that a reader never has to ask which."""
    names = Counter(
        node.name
        for tree in PRODUCT.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name[0] != "_"
    )
    assert sorted(name for name, count in names.items() if count > 1) == []


def test_docstrings_say_more_than_returns() -> None:
    """At most one docstring in ten starts with "Returns": the others say what the thing does for its caller."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for tree in PRODUCT.values() for node in ast.walk(tree) if isinstance(node, kinds)]
    first = [text.split()[0] for node in nodes if (text := ast.get_docstring(node))]
    assert first.count("Returns") <= len(first) / 10
