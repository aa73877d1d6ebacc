"""The hidden-state store: checks its files, and reads states from them by ranges."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import torch

from speculators.data.batches import StateSource
from speculators.data.shard_files import LocalFiles, ShardFiles, Span
from speculators.data.state_types import DTYPES
from speculators.data.store_layout import LAYOUT, StoreLayout
from speculators.errors import ArtifactError
from speculators.files.folders import MANIFEST

# Bytes of a sha256.
DIGEST_BYTES = 32
# Shards to check at a time; hashing lets other threads run.
CHECKING_THREADS = 8

_CPU = torch.device("cpu")

# What `StateStore.open` checks of each shard.
Check = Literal["all", "headers", "none"]


class DamagedShards(ArtifactError):
    """Some shards are missing, cut short or altered.

    Attributes:
        folder: the store.
        shards: their numbers; only these must be captured again.
    """

    def __init__(self, folder: Path, problems: dict[int, str]) -> None:
        self.folder, self.shards = folder, tuple(problems)
        super().__init__(
            f"{folder}: damaged: {_listed(problems)}", hint="run again: only these shards will be captured again"
        )


def _listed(problems: dict[int, str]) -> str:
    return ", ".join(f"{shard_name(number)} ({what})" for number, what in problems.items())


def shard_name(number: int) -> str:
    """Names the file of a shard."""
    return f"states-{number:05d}.safetensors"


def note_name(number: int) -> str:
    """Names the file of a shard's note, which holds its sha256 and that of each conversation's states in it."""
    return str(Path(shard_name(number)).with_suffix(".json"))


def note_file(folder: Path, number: int) -> Path:
    """Locates the note of a shard in a store's folder."""
    return folder / note_name(number)


def states_digest(*parts: torch.Tensor) -> str:
    """Hashes the states of one conversation as they are stored."""
    digest = hashlib.sha256()
    for part in parts:
        if not part.shape[1]:
            continue  # which torch cannot view as bytes
        stored: Any = part.contiguous().view(torch.uint8).numpy()
        digest.update(stored)
    return digest.hexdigest()


@attrs.frozen
class _Shard:
    """Where the tensors of a shard lie, and the hashes to check them.

    Attributes:
        first_bytes: the position of each tensor in the file.
        digests: of each conversation's states, 32 bytes each, in their order in the file; None in stores of earlier
            versions.
    """

    first_bytes: dict[str, int]
    digests: bytes | None


@attrs.frozen(eq=False)
class StateStore(StateSource):
    """A complete store, which is a `StateSource` for training.

    States are compared with their sha256 when they are first read, before the caller gets them, so opening a store
    need not hash all of it.

    Attributes:
        files: of the store, in a folder or in an object store.
        device: where 8-bit states are decoded.
    """

    files: ShardFiles
    layout: StoreLayout
    _sha256: tuple[str, ...]
    device: torch.device = _CPU
    _shards: dict[int, _Shard] = attrs.field(init=False, factory=dict)
    # [N] bool: whether each conversation's states were compared with their hash.
    _intact: np.ndarray = attrs.field(init=False, repr=False)
    _whole: set[int] = attrs.field(init=False, factory=set)

    @_intact.default
    def _none_compared(self) -> np.ndarray:
        return np.zeros(len(self.layout.lengths), np.bool_)

    @classmethod
    def open(
        cls, folder: Path, *, key: str | None = None, check: Check = "headers", device: torch.device = _CPU
    ) -> StateStore:
        """Opens a store in the folder that the writer filled; arguments and errors as for `of`."""
        return cls.of(LocalFiles(folder), key=key, check=check, device=device)

    @classmethod
    def of(
        cls, files: ShardFiles, *, key: str | None = None, check: Check = "headers", device: torch.device = _CPU
    ) -> StateStore:
        """Opens a store in a folder or an object store.

        Args:
            files: what the writer wrote.
            key: fingerprint that the states must have; None accepts any.
            check: "headers" checks every shard's size and header; "all" hashes every shard, too; "none" leaves each
                shard to the first read from it.
            device: where 8-bit states are decoded.

        Raises:
            DamagedShards: names the shards that must be captured again.
            ArtifactError: the store is incomplete, or holds states of different inputs; or shards of an object store
                are damaged.
        """
        manifest, written = files.record(MANIFEST), files.record(LAYOUT)
        try:
            layout, sha256 = StoreLayout.from_json(written), tuple(shard["sha256"] for shard in manifest["shards"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{files.place}: damaged, or written by another version: {error!r}") from error
        if key is not None and layout.key != key:
            raise ArtifactError(f"{files.place}: states of different inputs (its key is {layout.key}, expected {key})")
        store = cls(files, layout, sha256, device)
        numbers = () if check == "none" else range(len(layout.shards))
        if problems := store.damaged(numbers, hashes=check == "all"):
            raise store._damage(problems)
        return store

    def hashes(self) -> dict[str, str]:
        """Lists the sha256 of each shard by the name of its file, as recorded when it was written."""
        return {shard_name(number): sha256 for number, sha256 in enumerate(self._sha256)}

    def _damage(self, problems: dict[int, str]) -> ArtifactError:
        if isinstance(self.files, LocalFiles):
            return DamagedShards(self.files.folder, problems)
        return ArtifactError(f"{self.files.place}: damaged: {_listed(problems)}", hint="copy these files there again")

    def damaged(self, numbers: Iterable[int], *, hashes: bool = True) -> dict[int, str]:
        """Finds which of these shards are damaged, and how, several at a time.

        Args:
            hashes: compare each shard's sha256, not only size and header.
        """

        def problem(number: int) -> tuple[int, dict[str, int] | str]:
            sha256 = self._sha256[number] if hashes else None
            return number, check_shard(self.files, self.layout, number, sha256=sha256)

        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            return {number: what for number, what in pool.map(problem, numbers) if isinstance(what, str)}

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads the states of one conversation, as `states` does."""
        return self.states([index])[0]

    def states(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Reads the states of conversations: hidden_states [n, A*H] and last [n, H] of each.

        They have the stored type, and are on the CPU; those stored in 8 bits are float32, and on `device`.

        Raises:
            DamagedShards: they are not what was written. If they are in an object store, an ArtifactError.
        """
        if unopened := {int(number) for number in self.layout.places[list(indices), 0]} - self._shards.keys():
            with ThreadPoolExecutor(CHECKING_THREADS) as pool:
                self._shards.update(zip(unopened, pool.map(self._open_shard, unopened), strict=True))
        stored = iter(self.files.read([span for index in indices for span in self._spans(index)]))
        return [self._checked(index, [next(stored) for _ in self.layout.parts]) for index in indices]

    def _spans(self, index: int) -> list[Span]:
        number, row = self.layout.places[index].tolist()
        first, length = self._shards[number].first_bytes, int(self.layout.lengths[index])
        return [
            Span(shard_name(number), first[part.name] + row * part.row_bytes, length * part.row_bytes)
            for part in self.layout.parts
        ]

    def _checked(self, index: int, contents: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        length, parts = int(self.layout.lengths[index]), self.layout.parts
        typed = zip(contents, parts, (DTYPES[part.dtype] for part in parts), strict=True)
        tensors = tuple(
            torch.from_numpy(content.view(numpy_type).reshape(length, part.columns)).view(torch_type)
            for content, part, (torch_type, numpy_type, _) in typed
        )
        if not self._intact[index]:
            self._compare(index, tensors)
            self._intact[index] = True
        return self.layout.decode(tensors, self.device)

    def _compare(self, index: int, tensors: tuple[torch.Tensor, ...]) -> None:
        number = int(self.layout.places[index, 0])
        digests = self._shards[number].digests
        if digests is None:
            self._hash(number)
        elif bytes.fromhex(states_digest(*tensors)) != self._digest(digests, number, index):
            raise self._damage({number: f"the states of conversation {index} have another sha256"})

    def _digest(self, digests: bytes, number: int, index: int) -> bytes:
        place = int(np.flatnonzero(self.layout.shards[number] == index)[0])
        return digests[DIGEST_BYTES * place : DIGEST_BYTES * (place + 1)]

    def _open_shard(self, number: int) -> _Shard:
        checked = check_shard(self.files, self.layout, number)
        if isinstance(checked, str):
            raise self._damage({number: checked})
        try:
            note = self.files.record(note_name(number))
        except ArtifactError as error:
            raise self._damage({number: "its note is unreadable"}) from error
        digests = note.get("conversations")
        return _Shard(checked, None if digests is None else bytes.fromhex("".join(digests)))

    def _hash(self, number: int) -> None:
        """Hashes a whole shard, unless that is done: earlier versions kept no digest of each conversation."""
        if number not in self._whole:
            checked = check_shard(self.files, self.layout, number, sha256=self._sha256[number])
            if isinstance(checked, str):
                raise self._damage({number: checked})
            self._whole.add(number)


def check_shard(
    files: ShardFiles, layout: StoreLayout, number: int, *, sha256: str | None = None
) -> dict[str, int] | str:
    """Checks the file of a shard.

    Args:
        files: of the store.
        number: of the shard.
        sha256: the digest that the file must have; None checks only size and header.

    Returns:
        The first byte of each tensor in the file, or what is wrong with the file.
    """
    name = shard_name(number)
    size = files.size(name)
    if size is None:
        return "missing"
    try:
        (length,) = struct.unpack("<Q", files.read([Span(name, 0, 8)])[0].tobytes())
        header = json.loads(files.read([Span(name, 8, min(length, size))])[0].tobytes())
    except (ArtifactError, ValueError, OSError):
        return "no readable header"
    rows = layout.rows(number)
    for part in layout.parts:
        entry = header.get(part.name, {})
        if entry.get("shape") != [rows, part.columns] or entry.get("dtype") != DTYPES[part.dtype][2]:
            return f"its header does not describe {rows} tokens"
    # safetensors: 8 bytes with the header's length, the header, then the tensors without gaps.
    expected = 8 + length + layout.bytes_for(rows)
    if size != expected:
        return f"{size} bytes instead of {expected}"
    if sha256 is not None and files.sha256(name) != sha256:
        return "its sha256 is not the one recorded when it was written"
    return {part.name: 8 + length + header[part.name]["data_offsets"][0] for part in layout.parts}
