"""The public names of the package: one list, lazy, and visible to type checkers."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import speculators

SOURCE = Path(speculators.__file__)


def test_the_three_lists_of_public_names_agree() -> None:
    """`__all__`, the imports that type checkers see and the map that the interpreter uses hold the same names."""
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    assert all(isinstance(node, ast.ImportFrom) for node in block.body)
    seen = {node.module: tuple(alias.name for alias in node.names) for node in block.body}
    assert seen == {f"speculators.{module}": names for module, names in speculators._HOMES.items()}
    assert sorted(speculators.__all__) == sorted(name for names in seen.values() for name in names)


@pytest.mark.parametrize("name", speculators.__all__)
def test_a_public_name_has_a_docstring(name: str) -> None:
    """Each name can be imported, is the object that its home module defines, and documents its purpose."""
    value = getattr(speculators, name)
    assert name in dir(speculators)
    assert inspect.getdoc(value)


def test_no_public_name_is_a_submodule() -> None:
    """`speculators.NAME` must not change from a function to a module when somebody imports a submodule."""
    assert {module.name for module in pkgutil.iter_modules(speculators.__path__)}.isdisjoint(speculators.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    """The error reads like Python's own, so that `hasattr` and `from speculators import x` work as usual."""
    with pytest.raises(AttributeError, match="module 'speculators' has no attribute 'nothing'"):
        _ = speculators.nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from speculators import nothing")


def test_importing_the_package_loads_nothing_heavy() -> None:
    """Neither torch nor attrs come with `import speculators`; the config's names bring no torch."""
    code = (
        "import sys, speculators; assert not {'torch', 'attrs', 'attr', 'numpy'} & set(sys.modules); "
        "from speculators import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig, SpeculatorsError; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plugins_keep_their_import_paths() -> None:
    """Modules that plug-ins import stay importable, with the names that plug-ins take from them."""
    names = {
        "config": ("SpeculatorModelConfig", "VerifierFacts", "derived", "knob", "known_losses", "positive"),
        "model": ("SpeculatorModel", "build_model", "check_contract", "trainer_kwargs"),
        "drafter": ("Drafter", "Proposal", "Replays", "chain"),
        "losses": ("head_loss", "mixture"),
        "models.base_components": ("take_over",),
        "models.chains": ("ChainDrafter", "RecurrentModel", "chain_metrics", "unroll_to_places"),
        "nn.layout": ("RowLayout",),
        "nn.norm": ("RMSNorm",),
        "nn.vocab": ("register_vocab",),
    }
    for module, members in names.items():
        loaded = importlib.import_module(f"speculators.{module}")
        assert [name for name in members if not hasattr(loaded, name)] == []
