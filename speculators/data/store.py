"""The hidden-state store: its layout in shards, and reading states through memory maps."""

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
from speculators.data.parts import read_part
from speculators.errors import ArtifactError
from speculators.files.disk import file_sha256
from speculators.files.folders import FORMAT, read_manifest, read_record

LAYOUT = "layout.json"
# Tokens per shard, by the device that captures. A GPU captures data sets of which small shards would be too many files.
SHARD_TOKENS = {"cpu": 8192, "cuda": 65_536}
STATES, LAST = "hidden_states", "last"
# Shards that are checked at a time: hashing leaves other threads free to run.
CHECKING_THREADS = 8

# What `StateStore.open` checks of each shard.
Check = Literal["all", "headers", "none"]

# Name in the recipe: (torch type, numpy type of the same width, name in a safetensors header). numpy has no bfloat16,
# so bytes are read as integers and viewed as the torch type.
DTYPES: dict[str, tuple[torch.dtype, Any, str]] = {
    "bfloat16": (torch.bfloat16, np.int16, "BF16"),
    "float16": (torch.float16, np.int16, "F16"),
    "float32": (torch.float32, np.int32, "F32"),
}


class DamagedShards(ArtifactError):
    """Some shards are missing, cut short or altered.

    Attributes:
        folder: the store.
        shards: their numbers; only these must be captured again.
    """

    def __init__(self, folder: Path, problems: dict[int, str]) -> None:
        self.folder, self.shards = folder, tuple(problems)
        listed = ", ".join(f"{shard_name(number)} ({what})" for number, what in problems.items())
        super().__init__(f"{folder}: damaged: {listed}", hint="run again: only these shards will be captured again")


def shard_name(number: int) -> str:
    """Names the file of a shard."""
    return f"states-{number:05d}.safetensors"


def note_file(folder: Path, number: int) -> Path:
    """Locates the note of a shard: its sha256, and that of each conversation's states in it."""
    return folder / Path(shard_name(number)).with_suffix(".json")


def states_digest(hidden_states: torch.Tensor, last: torch.Tensor) -> str:
    """Hashes the states of one conversation as they are stored."""
    digest = hashlib.sha256()
    for part in (hidden_states, last):
        stored: Any = part.contiguous().view(torch.uint8).numpy()
        digest.update(stored)
    return digest.hexdigest()


def plan_shards(lengths: Sequence[int], shard_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Distributes conversations over shards, in the order of their length.

    A pure function: a shard that is captured again after a kill or damage has the same conversations in the same order,
    and so is computed in the same batches. Sorting by length puts conversations together that batch without padding.
    """
    shards: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: (int(lengths[i]), i)):
        if not shards or lengths[index] > room:
            shards.append([])
            room = shard_tokens
        shards[-1].append(index)
        room -= int(lengths[index])
    return tuple(map(tuple, shards))


def _ints(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(map(int, lengths))


@attrs.frozen(eq=False)
class StoreLayout:
    """The layout of a store, known before anything is captured.

    Attributes:
        key: fingerprint of the inputs of the states; a store with another key is never read.
        lengths: number of tokens of each conversation.
        aux_width: A*H, columns of the auxiliary states.
        width: H, columns of the last layer's state.
        dtype: "bfloat16", "float16" or "float32".
        shard_tokens: tokens per shard; a longer conversation gets a shard of its own.
        shards: the conversations of each shard, in their order in the file.
        places: [N, 2] int64, each conversation's shard and first row in it.
    """

    key: str
    lengths: tuple[int, ...] = attrs.field(converter=_ints)
    aux_width: int
    width: int
    dtype: str = attrs.field(validator=attrs.validators.in_(DTYPES))
    shard_tokens: int = SHARD_TOKENS["cpu"]
    shards: tuple[tuple[int, ...], ...] = attrs.field(init=False)
    places: np.ndarray = attrs.field(init=False, repr=False)

    @shards.default
    def _shards(self) -> tuple[tuple[int, ...], ...]:
        return plan_shards(self.lengths, self.shard_tokens)

    @places.default
    def _places(self) -> np.ndarray:
        places = np.zeros((len(self.lengths), 2), np.int64)
        for number, members in enumerate(self.shards):
            row = 0
            for index in members:
                places[index] = number, row
                row += self.lengths[index]
        return places

    def rows(self, shard: int) -> int:
        """Counts the tokens of a shard: rows of its tensors."""
        return sum(self.lengths[index] for index in self.shards[shard])

    def bytes_for(self, tokens: int) -> int:
        """Computes the size on disk of the states of this many tokens."""
        return store_bytes(tokens, aux_width=self.aux_width, width=self.width, dtype=self.dtype)

    def to_json(self) -> dict[str, Any]:
        """The content of the store's `layout.json`."""
        plain = attrs.asdict(self, filter=lambda field, _: field.init)
        return {"format": FORMAT, **plain, "lengths": list(self.lengths)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StoreLayout:
        """Reads what `to_json` wrote."""
        return cls(**{field.name: values[field.name] for field in attrs.fields(cls) if field.init})


def store_bytes(tokens: int, *, aux_width: int, width: int, dtype: str) -> int:
    """Computes the size on disk of the states of this many tokens, for plans that announce it."""
    return tokens * (aux_width + width) * DTYPES[dtype][0].itemsize


@attrs.frozen
class _Shard:
    """What reading a shard needs to know.

    Attributes:
        first_bytes: of each tensor in the file.
        digests: of each conversation's states, in their order in the file; None in stores of earlier versions.
    """

    first_bytes: dict[str, int]
    digests: list[str] | None


@attrs.frozen(eq=False)
class StateStore(StateSource):
    """A complete store, which is a `StateSource` for training.

    States are compared with their sha256 when they are first read, before anybody gets their values: nothing waits
    until a whole store is hashed.
    """

    folder: Path
    layout: StoreLayout
    _sha256: tuple[str, ...]
    _shards: dict[int, _Shard] = attrs.field(init=False, factory=dict)
    # Conversations whose states were compared, and shards that were hashed whole.
    _intact: set[int] = attrs.field(init=False, factory=set)
    _whole: set[int] = attrs.field(init=False, factory=set)

    @classmethod
    def open(cls, folder: Path, *, key: str | None = None, check: Check = "headers") -> StateStore:
        """Opens a store.

        Args:
            folder: the folder that the writer filled.
            key: fingerprint that the states must have; None accepts any.
            check: "headers" checks every shard's size and header; "all" hashes every shard, too; "none" leaves each
                shard to the first read from it.

        Raises:
            DamagedShards: names the shards that must be captured again.
            ArtifactError: the store is incomplete, or holds states of different inputs.
        """
        manifest = read_manifest(folder)
        layout = StoreLayout.from_json(read_record(folder / LAYOUT))
        if key is not None and layout.key != key:
            raise ArtifactError(f"{folder}: states of different inputs (its key is {layout.key}, expected {key})")
        store = cls(folder, layout, tuple(shard["sha256"] for shard in manifest["shards"]))
        numbers = () if check == "none" else range(len(layout.shards))
        if problems := store.damaged(numbers, hashes=check == "all"):
            raise DamagedShards(folder, problems)
        return store

    def damaged(self, numbers: Iterable[int], *, hashes: bool = True) -> dict[int, str]:
        """Finds which of these shards are damaged, and how, several at a time.

        Args:
            hashes: compare each shard's sha256, not only size and header.
        """

        def problem(number: int) -> tuple[int, dict[str, int] | str]:
            sha256 = self._sha256[number] if hashes else None
            return number, check_shard(self.folder, self.layout, number, sha256=sha256)

        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            return {number: what for number, what in pool.map(problem, numbers) if isinstance(what, str)}

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads the states of one conversation: hidden_states [n, A*H] and last [n, H], in the stored type.

        Raises:
            DamagedShards: they are not what was written.
        """
        number, row = self.layout.places[index].tolist()
        shard = self._shards.get(number) or self._open_shard(number)
        length = self.layout.lengths[index]
        states = self._part(number, shard.first_bytes[STATES], row, (length, self.layout.aux_width))
        last = self._part(number, shard.first_bytes[LAST], row, (length, self.layout.width))
        if index not in self._intact:
            if shard.digests is None:
                self._hash(number)
            elif states_digest(states, last) != shard.digests[self.layout.shards[number].index(index)]:
                raise DamagedShards(self.folder, {number: f"the states of conversation {index} have another sha256"})
            self._intact.add(index)
        return states, last

    def states(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Reads the states of several conversations."""
        return [self.read(index) for index in indices]

    def _open_shard(self, number: int) -> _Shard:
        checked = check_shard(self.folder, self.layout, number)
        if isinstance(checked, str):
            raise DamagedShards(self.folder, {number: checked})
        try:
            note = read_record(note_file(self.folder, number))
        except ArtifactError as error:
            raise DamagedShards(self.folder, {number: "its note is unreadable"}) from error
        self._shards[number] = _Shard(checked, note.get("conversations"))
        return self._shards[number]

    def _hash(self, number: int) -> None:
        """Hashes a whole shard, unless that is done: earlier versions kept no digest of each conversation."""
        if number not in self._whole:
            checked = check_shard(self.folder, self.layout, number, sha256=self._sha256[number])
            if isinstance(checked, str):
                raise DamagedShards(self.folder, {number: checked})
            self._whole.add(number)

    def _part(self, number: int, first_byte: int, row: int, shape: tuple[int, int]) -> torch.Tensor:
        torch_type, numpy_type, _ = DTYPES[self.layout.dtype]
        offset = first_byte + row * shape[1] * torch_type.itemsize
        part = read_part(self.folder / shard_name(number), numpy_type, offset=offset, shape=shape)
        return torch.from_numpy(part).view(torch_type)


def check_shard(folder: Path, layout: StoreLayout, number: int, *, sha256: str | None = None) -> dict[str, int] | str:
    """Checks the file of a shard.

    Args:
        folder: the store's folder.
        number: of the shard.
        sha256: the digest that the file must have; None checks only size and header.

    Returns:
        The first byte of each tensor in the file, or what is wrong with the file.
    """
    path = folder / shard_name(number)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
    except FileNotFoundError:
        return "missing"
    except (struct.error, ValueError, OSError):
        return "no readable header"
    rows, kind = layout.rows(number), DTYPES[layout.dtype][2]
    for name, columns in ((STATES, layout.aux_width), (LAST, layout.width)):
        entry = header.get(name, {})
        if entry.get("shape") != [rows, columns] or entry.get("dtype") != kind:
            return f"its header does not describe {rows} tokens"
    # safetensors: 8 bytes with the header's length, the header, then the tensors without gaps.
    expected = 8 + length + layout.bytes_for(rows)
    if size != expected:
        return f"{size} bytes instead of {expected}"
    if sha256 is not None and file_sha256(path) != sha256:
        return "its sha256 is not the one recorded when it was written"
    return {name: 8 + length + header[name]["data_offsets"][0] for name in (STATES, LAST)}
