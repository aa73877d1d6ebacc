"""`[algorithm]`: the registered config class decides which keys it has; a plug-in may register one."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from speculators.config import CONFIGS, SpeculatorModelConfig
from speculators.errors import RegistryError
from speculators.files.disk import read_json, write_json
from speculators.registry import near_miss
from speculators.structure.converter import CONVERTER, build
from speculators.structure.faults import Fault, Invalid, wrong

_OWN_KEYS = ("name", "module")
# In a run folder: where the run's plug-in lay, so that the run can be used from anywhere.
PLACE = "plugin.json"


@attrs.frozen(kw_only=True)
class AlgorithmSection:
    """`[algorithm]`: a registered name; the other keys are the fields of the config registered under it.

    Attributes:
        name: the algorithm, as `spec ls` lists it or a plug-in registers it.
        module: a plug-in to import, which registers the algorithm.
    """

    name: str
    module: str | None = None
    config: SpeculatorModelConfig


def import_plugin(module: str, folder: Path) -> None:
    """Imports a plug-in: an installed one, or one in the recipe's folder, where a run found it, or the working folder.

    Raises:
        Invalid: the plug-in cannot be found, or fails when imported.
    """
    try:
        # The folders go to the end of the path, and only for a module that is nowhere else, so that a file beside the
        # recipe never shadows an installed package.
        if importlib.util.find_spec(module.partition(".")[0]) is None:
            places = (folder.resolve(), *_remembered(folder, module), Path.cwd())
            sys.path.extend(str(place) for place in places if str(place) not in sys.path)
            importlib.invalidate_caches()
        importlib.import_module(module)
    # The plug-in is somebody else's code and may raise anything.
    except Exception as error:
        message = f"importing {module!r} failed: {type(error).__name__}: {error}"
        hint = "install it, put it beside the recipe, or set PYTHONPATH" if isinstance(error, ImportError) else ""
        raise Invalid([Fault(("module",), message, hint)]) from error


def remember_plugin(module: str, run: Path) -> None:
    """Notes in a run folder where the plug-in that the run uses was imported from."""
    top = sys.modules[module.partition(".")[0]]
    if top.__spec__ is not None and top.__spec__.origin:
        file = Path(top.__spec__.origin).resolve()
        folder = file.parents[1] if file.name == "__init__.py" else file.parent
        write_json(run / PLACE, {"module": module, "folder": str(folder)})


def _remembered(folder: Path, module: str) -> list[Path]:
    """The folder that `remember_plugin` noted for this plug-in, if it did."""
    note = read_json(folder / PLACE)
    known = isinstance(note, dict) and note.get("module") == module and isinstance(note.get("folder"), str)
    return [Path(note["folder"])] if known else []


def _imported_from(module: str) -> str:
    spec = sys.modules[module].__spec__
    return f"{module} from {spec.origin}" if spec is not None and spec.origin else module


@CONVERTER.register_structure_hook
def _algorithm(value: Any, _: Any) -> AlgorithmSection:
    if not isinstance(value, Mapping):
        raise Invalid([wrong("a table", value)])
    head = {key: value[key] for key in _OWN_KEYS if key in value}
    faults = [
        Fault((key,), f"must be a string, got {setting!r}")
        for key, setting in head.items()
        if not isinstance(setting, str)
    ]
    if "name" not in head:
        faults.append(Fault(("name",), "is missing", f"algorithms: {', '.join(CONFIGS.names())}"))
    if faults:
        raise Invalid(faults)
    try:
        config_class = CONFIGS.get(head["name"])
    except RegistryError:
        names = CONFIGS.names()
        message = f"no algorithm {head['name']!r}; available: {', '.join(names)}"
        hint = near_miss(head["name"], names) or "for a plug-in, set algorithm.module"
        if (module := head.get("module")) in sys.modules:
            message += f"; algorithm.module is {_imported_from(module)}, which registers no algorithm of that name"
            hint = "if this is not your file, rename your package; if it is, register its config under that name"
        raise Invalid([Fault(("name",), message, hint)]) from None
    keys = [field.name for field in config_class.recipe_fields()]
    own = {key: item for key, item in value.items() if key not in _OWN_KEYS}
    return AlgorithmSection(**head, config=build(config_class, own, keys, also=_OWN_KEYS))
