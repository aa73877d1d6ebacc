"""A registry of named things whose errors list what exists, and the spelling of names in messages."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Generic, TypeVar

from speculators.errors import RegistryError

T = TypeVar("T")


def near_miss(name: str, known: list[str]) -> str:
    """Suggests the closest known name, as "did you mean 'x'?"; "" if none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def qualified_name(thing: object) -> str:
    """The spelling of a class or function in messages: `package.module.Class`."""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}"


class Registry(Generic[T]):
    """Maps each name to one thing.

    Args:
        kind: the kind of things, for messages ("algorithm").
        find: called with a name that is not registered yet; may register it by importing a module.
        discover: lists the names that `find` could register, which completes messages and `names()`.
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
        """Registers `thing`; raises RegistryError that names both things if the name is taken."""
        present = self._things.get(name)
        # A module that is imported a second time (a reload, a script run as __main__) registers the same class again
        # as another object, so names are compared and not identities.
        if present is not None and qualified_name(present) != qualified_name(thing):
            raise RegistryError(
                f"{self.kind} {name!r} is registered twice: {qualified_name(present)} and {qualified_name(thing)}",
                hint="rename one of them",
            )
        self._things[name] = thing
        return thing

    def get(self, name: str) -> T:
        """Looks up `name`, importing what registers it; raises RegistryError that lists the names that exist."""
        if name not in self._things:
            self._find(name)
        if name not in self._things:
            names = self.names()
            hint = near_miss(name, names)
            raise RegistryError(f"no {self.kind} {name!r}; available: {', '.join(names) or 'none'}", hint=hint)
        return self._things[name]

    def names(self) -> list[str]:
        """Lists all names, registered or discoverable, sorted."""
        return sorted({*self._things, *self._discover()})
