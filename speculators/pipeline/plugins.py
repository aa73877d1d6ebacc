"""Somebody else's algorithm: which ones are, and what their code raises told as their own."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speculators.config import SpeculatorModelConfig
from speculators.errors import ContractError, SpeculatorsError
from speculators.model import MODELS, SpeculatorModel


def is_plugin(name: str) -> bool:
    """Whether an algorithm's folder is outside this package."""
    return not SpeculatorModelConfig.get_class(name).__module__.startswith("speculators.models.")


@contextmanager
def named(name: str) -> Iterator[None]:
    """Turns an exception out of a plug-in's own code into an error that names it; any other passes.

    Raises:
        ContractError: as `failure`.
    """
    try:
        yield
    except SpeculatorsError:
        raise
    # Somebody else's code may raise anything.
    except Exception as error:
        if not is_plugin(name) or not _own_frames(name, error):
            raise
        raise failure(name, error, "") from error


def failure(name: str, error: Exception, where: str) -> ContractError:
    """Returns what says that a plug-in failed: its class, the exception, and the lines of its own that led there.

    Args:
        where: it was run, in words; "" in the run itself.
    """
    # Its class may not be there yet: its module may be what failed.
    get = SpeculatorModel.get_class if name in MODELS.names() else SpeculatorModelConfig.get_class
    place = f"{get(name).__module__}.{get(name).__qualname__}"
    words = " ".join(filter(None, (place, "failed", where)))
    lines = [f"  {frame.filename}:{frame.lineno}, in {frame.name}: {frame.line}" for frame in _own_frames(name, error)]
    return ContractError(f"{words}: {type(error).__name__}: {error}", hint="\n".join(lines))


def _own_frames(name: str, error: Exception) -> list[traceback.FrameSummary]:
    """Returns the part of a traceback that is in the plug-in's files."""
    config_class = SpeculatorModelConfig.get_class(name)
    try:
        file = Path(inspect.getfile(config_class)).resolve()
    except (OSError, TypeError):  # typed into an interpreter: it has no file
        return []
    package = "." in config_class.__module__ or file.name == "__init__.py"

    def own(path: Path) -> bool:
        return file.parent in path.parents if package else path == file

    return [frame for frame in traceback.extract_tb(error.__traceback__) if own(Path(frame.filename).resolve())]
