"""A registry of named things that lists what exists when a name is not found."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Generic, TypeVar

from speculators.errors import RegistryError

T = TypeVar("T")


def near_miss(name: str, known: list[str]) -> str:
    """Returns "did you mean 'x'?" for the closest known name, or ""."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


class Registry(Generic[T]):
    """Maps a name to a thing, once.

    Args:
        kind: what the things are, for messages ("algorithm").
        find: called with a name that is not registered yet; may register it by importing a module.
        discover: lists names that `find` could register, so that messages and `names()` are complete.
    """

    def __init__(
        self,
        kind: str,
        find: Callable[[str], None] = lambda name: None,
        discover: Callable[[], list[str]] = list,
    ) -> None:
        self.kind = kind
        self._find = find
        self._discover = discover
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Registers `thing`; raises RegistryError that names both if the name is taken."""
        held = self._things.get(name)
        # A module that is imported a second time (reload, run as a script) registers the same thing again.
        if held is not None and _address(held) != _address(thing):
            raise RegistryError(
                f"{self.kind} {name!r} is registered twice: {_address(held)} and {_address(thing)}",
                hint="rename one of them",
            )
        self._things[name] = thing
        return thing

    def get(self, name: str) -> T:
        """Returns the thing called `name`; raises RegistryError that lists the names there are."""
        if name not in self._things:
            self._find(name)
        if name not in self._things:
            names = self.names()
            hint = near_miss(name, names)
            raise RegistryError(f"no {self.kind} {name!r}; there are: {', '.join(names) or 'none'}", hint=hint)
        return self._things[name]

    def names(self) -> list[str]:
        """Returns all names, registered or discoverable, sorted."""
        return sorted({*self._things, *self._discover()})


def _address(thing: object) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}"
