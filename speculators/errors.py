"""Errors for people: where, what was found, what to do. Raised anywhere, caught once, in the CLI."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One fault of an input.

    Args:
        path: dotted TOML (or JSON) path of the value, "" for the whole file.
        message: the fault and the allowed values, in one sentence.
        hint: the remedy, or the closest known name; "" for none.
        file: the file that contains the value, None for a value from the command line.
        line: 1-based line in `file`, where it is known.
    """

    path: str
    message: str
    hint: str = ""
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        head = ": ".join(part for part in (place, self.path, self.message) if part)
        return f"{head} ({self.hint})" if self.hint else head


class SpeculatorsError(Exception):
    """Base of every error that the user can remedy; the CLI prints it without a traceback.

    Attributes:
        problems: the faults, one by one.

    Example:
        try:
            recipe = load_recipe("mine.toml")
        except SpeculatorsError as error:
            print(error)
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem("", message, hint),)
        super().__init__(f"{message}\n{hint}" if hint else message)


class RecipeError(SpeculatorsError):
    """A recipe or a command line that cannot be used; lists all its problems."""

    exit_code = 2

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        listed = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in listed))
        self.problems = listed


class RegistryError(SpeculatorsError):
    """A name that is registered twice, or not at all."""

    exit_code = 2


class ContractError(SpeculatorsError):
    """An algorithm that lacks a part of the contract; names the class, the part and the remedy."""


class LockError(SpeculatorsError):
    """A lock that cannot be used: missing, damaged, of another format, or of another recipe."""

    exit_code = 2


class ArtifactError(SpeculatorsError):
    """A file or folder that is missing, damaged, or differs from its manifest."""


class VerifierError(SpeculatorsError):
    """A verifier that cannot be obtained, read or used."""


class DataError(SpeculatorsError):
    """Conversations, suites or hidden states that cannot be used."""


class TrainingError(SpeculatorsError):
    """Training that cannot continue: a non-finite loss, or processes that disagree."""


class ServerError(SpeculatorsError):
    """A server that cannot be reached, refuses a request, or answers nonsense; quotes the server.

    Args:
        message: where, and what the server answered.
        hint: what to do.
        status: of the HTTP answer; None without an answer.
        passes: whether the same request may succeed later.
    """

    def __init__(self, message: str, *, hint: str = "", status: int | None = None, passes: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.message, self.hint, self.status, self.passes = message, hint, status, passes

    def after(self, attempts: int) -> ServerError:
        """The same error with the number of attempts in its message."""
        if attempts == 1:
            return self
        return ServerError(f"{self.message} (tried {attempts} times)", hint=self.hint, status=self.status)
