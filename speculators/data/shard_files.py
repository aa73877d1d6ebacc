"""Reads parts of a hidden-state store's files, in a folder or in an object store (through fsspec)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import attrs
import numpy as np

from speculators.data.parts import read_part
from speculators.errors import ArtifactError, DataError
from speculators.files.disk import BLOCK_BYTES, file_sha256
from speculators.files.folders import checked_record, read_record


class Span(NamedTuple):
    """A part of a file, in bytes."""

    name: str
    offset: int
    size: int


class ShardFiles(Protocol):
    """Reads the files of one store by their names.

    Every method raises ArtifactError for a file that is missing, cut short or damaged.

    Attributes:
        place: the folder or URL, for messages.
    """

    @property
    def place(self) -> str: ...

    def size(self, name: str) -> int | None:
        """Looks up the size of a file in bytes; None if it is missing."""

    def read(self, spans: Sequence[Span]) -> list[np.ndarray]:
        """Copies parts of files: [size] uint8 each."""

    def record(self, name: str) -> dict[str, Any]:
        """Reads a JSON table of this package's format."""

    def sha256(self, name: str) -> str:
        """Hashes a file."""


@attrs.frozen
class LocalFiles:
    """The files of a store in a folder."""

    folder: Path

    @property
    def place(self) -> str:
        """The folder."""
        return str(self.folder)

    def size(self, name: str) -> int | None:
        """Looks up the size of a file in bytes; None if it is missing."""
        path = self.folder / name
        return path.stat().st_size if path.is_file() else None

    def read(self, spans: Sequence[Span]) -> list[np.ndarray]:
        """Copies parts of files: [size] uint8 each."""
        return [read_part(self.folder / name, np.uint8, offset=offset, shape=(size,)) for name, offset, size in spans]

    def record(self, name: str) -> dict[str, Any]:
        """Reads a JSON table of this package's format."""
        return read_record(self.folder / name)

    def sha256(self, name: str) -> str:
        """Hashes a file."""
        return file_sha256(self.folder / name)


@attrs.frozen
class RemoteFiles:
    """The files of a store under a URL, which are only read. No file name is taken from what lies there.

    Attributes:
        place: the URL.
    """

    place: str
    _system: Any
    _root: str

    @classmethod
    def at(cls, url: str) -> RemoteFiles:
        """Prepares to read under a URL, with the credentials that fsspec's own packages find.

        Raises:
            DataError: the package for this kind of URL is not installed, or fsspec does not know the kind.
        """
        try:
            import fsspec.core
        except ImportError:
            raise DataError(f"{url}: needs the library `fsspec`", hint="pip install 'spec-recipes[fsspec]'") from None
        try:
            system, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            hint = "install the package that it names; fsspec's documentation lists the kinds of URL"
            raise DataError(f"{url}: {error}", hint=hint) from None
        return cls(url, system, root.rstrip("/"))

    def size(self, name: str) -> int | None:
        """Looks up the size of a file in bytes; None if it is missing."""
        try:
            with self._errors(name):
                return int(self._system.info(self._path(name))["size"])
        except ArtifactError:
            return None

    def read(self, spans: Sequence[Span]) -> list[np.ndarray]:
        """Copies parts of files: [size] uint8 each. Requests all of them at once."""
        filled = [span for span in spans if span.size]  # an empty range would request the whole file
        ranges = [self._path(span.name) for span in filled], [span.offset for span in filled]
        with self._errors(filled[0].name if filled else ""):
            contents = self._system.cat_ranges(*ranges, [span.offset + span.size for span in filled], on_error="raise")
        for span, content in zip(filled, contents, strict=True):
            if len(content) != span.size:
                raise ArtifactError(f"{self.place}/{span.name}: cut short")
        arrived = iter(contents)
        return [np.frombuffer(bytearray(next(arrived) if span.size else b""), np.uint8) for span in spans]

    def record(self, name: str) -> dict[str, Any]:
        """Reads a JSON table of this package's format."""
        with self._errors(name):
            content = self._system.cat_file(self._path(name))
        return checked_record(content, f"{self.place}/{name}")

    def sha256(self, name: str) -> str:
        """Hashes a file."""
        digest = hashlib.sha256()
        with self._errors(name), self._system.open(self._path(name), "rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise ArtifactError(f"{self.place}/{name}: missing") from None
        # Each kind of object store raises errors of its own, for its network, credentials and server.
        except Exception as error:
            hint = "check the network, the credentials in the environment, and the URL in data.store"
            raise DataError(
                f"{self.place}/{name}: cannot be read: {type(error).__name__}: {error}", hint=hint
            ) from error
