"""The hidden-state store: its layout in shards, and reading states through memory maps."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import attrs
import numpy as np
import torch

from speculators.chunks import CHUNKS
from speculators.data.batches import StateSource
from speculators.data.parts import read_part
from speculators.data.state_types import DTYPES, Part, from_stored, stored_parts, to_stored
from speculators.errors import ArtifactError
from speculators.files.disk import file_sha256
from speculators.files.folders import FORMAT, read_manifest, read_record

LAYOUT = "layout.json"
# A store of more tokens has larger shards instead of more of them, up to the size of which capture holds three in memory.
MOST_SHARDS = 4096
LARGEST_SHARD = 1 << 29  # bytes
# Of a sha256.
DIGEST_BYTES = 32
# Shards that are checked at a time: hashing leaves other threads free to run.
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
        listed = ", ".join(f"{shard_name(number)} ({what})" for number, what in problems.items())
        super().__init__(f"{folder}: damaged: {listed}", hint="run again: only these shards will be captured again")


def shard_name(number: int) -> str:
    """Names the file of a shard."""
    return f"states-{number:05d}.safetensors"


def note_file(folder: Path, number: int) -> Path:
    """Locates the note of a shard: its sha256, and that of each conversation's states in it."""
    return folder / Path(shard_name(number)).with_suffix(".json")


def states_digest(*parts: torch.Tensor) -> str:
    """Hashes the states of one conversation as they are stored."""
    digest = hashlib.sha256()
    for part in parts:
        if not part.shape[1]:
            continue  # which torch cannot view as bytes
        stored: Any = part.contiguous().view(torch.uint8).numpy()
        digest.update(stored)
    return digest.hexdigest()


def plan_shards(lengths: Sequence[int] | np.ndarray, shard_tokens: int) -> tuple[np.ndarray, ...]:
    """Distributes conversations over shards, in the order of their length.

    A pure function: a shard that is captured again after a kill or damage has the same conversations in the same order,
    and so is computed in the same batches. Sorting by length puts conversations together that batch without padding.

    Returns:
        [n] int64 for each shard: views of one array.
    """
    lengths = _int64(lengths)
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    cuts = [0]
    while cuts[-1] < len(order):
        full = shard_tokens + (ends[cuts[-1] - 1] if cuts[-1] else 0)
        cuts.append(max(cuts[-1] + 1, int(np.searchsorted(ends, full, side="right"))))
    return tuple(order[start:end] for start, end in pairwise(cuts))


def shard_tokens_for(tokens: int, row_bytes: int, *, at_least: int) -> int:
    """Chooses the tokens per shard: more than `at_least` where a store would have too many files otherwise.

    Args:
        tokens: of the whole store.
        row_bytes: stored per token.
        at_least: what the device's `CHUNKS` say.
    """
    return max(at_least, min(-(-tokens // MOST_SHARDS), LARGEST_SHARD // row_bytes))


def _int64(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(lengths, np.int64)


@attrs.frozen(eq=False)
class StoreLayout:
    """The layout of a store, known before anything is captured.

    Attributes:
        key: fingerprint of the inputs of the states; a store with another key is never read.
        lengths: [N] int64, number of tokens of each conversation.
        aux_width: A*H, columns of the auxiliary states.
        width: H, columns of the last layer's state.
        dtype: "bfloat16", "float16", "float32" or "fp8".
        ends_in_last: whether the last H auxiliary columns are the last layer's state, which is then stored once.
        shard_tokens: tokens per shard; a longer conversation gets a shard of its own.
        shards: [n] int64 for each shard, its conversations in their order in the file.
        places: [N, 2] int64, each conversation's shard and first row in it.
        parts: the tensors of each shard.
    """

    key: str
    lengths: np.ndarray = attrs.field(converter=_int64, repr=False)
    aux_width: int
    width: int
    dtype: str = attrs.field(validator=attrs.validators.in_(DTYPES))
    shard_tokens: int = CHUNKS["cpu"].shard_tokens
    ends_in_last: bool = False
    shards: tuple[np.ndarray, ...] = attrs.field(init=False, repr=False)
    places: np.ndarray = attrs.field(init=False, repr=False)
    parts: tuple[Part, ...] = attrs.field(init=False, repr=False)

    @shards.default
    def _shards(self) -> tuple[np.ndarray, ...]:
        return plan_shards(self.lengths, self.shard_tokens)

    @places.default
    def _places(self) -> np.ndarray:
        places = np.zeros((len(self.lengths), 2), np.int64)
        for number, members in enumerate(self.shards):
            lengths = self.lengths[members]
            places[members, 0] = number
            places[members, 1] = np.cumsum(lengths) - lengths
        return places

    @parts.default
    def _parts(self) -> tuple[Part, ...]:
        stored = self.aux_width - self.width * self.ends_in_last
        return stored_parts(aux_width=stored, width=self.width, dtype=self.dtype)

    def rows(self, shard: int) -> int:
        """Counts the tokens of a shard: rows of its tensors."""
        return int(self.lengths[self.shards[shard]].sum())

    def bytes_for(self, tokens: int) -> int:
        """Computes the size on disk of the states of this many tokens."""
        return tokens * sum(part.row_bytes for part in self.parts)

    def encode(self, hidden_states: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Makes the parts that are stored of states [n, A*H] and [n, H], on their device."""
        return to_stored(hidden_states[:, : self.parts[0].columns], last, self.dtype)

    def decode(self, parts: tuple[torch.Tensor, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Gives hidden_states [n, A*H] and last [n, H] of stored parts; 8 bits are decoded on `device`."""
        states, last = from_stored(parts, device)
        return torch.cat([states, last], 1) if self.ends_in_last else states, last

    def to_json(self) -> dict[str, Any]:
        """The content of the store's `layout.json`."""
        plain = attrs.asdict(self, filter=lambda field, _: field.init)
        if not self.ends_in_last:
            # As earlier versions wrote it: an interrupted capture goes on.
            del plain["ends_in_last"]
        return {"format": FORMAT, **plain, "lengths": self.lengths.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StoreLayout:
        """Reads what `to_json` wrote."""
        return cls(**{field.name: values[field.name] for field in attrs.fields(cls) if field.name in values})


def store_bytes(tokens: int, *, aux_width: int, width: int, dtype: str) -> int:
    """Computes the size on disk of the states of this many tokens, for plans that announce it."""
    return tokens * sum(part.row_bytes for part in stored_parts(aux_width=aux_width, width=width, dtype=dtype))


@attrs.frozen
class _Shard:
    """What reading a shard needs to know.

    Attributes:
        first_bytes: of each tensor in the file.
        digests: of each conversation's states, 32 bytes each, in their order in the file; None in stores of earlier
            versions.
    """

    first_bytes: dict[str, int]
    digests: bytes | None


@attrs.frozen(eq=False)
class StateStore(StateSource):
    """A complete store, which is a `StateSource` for training.

    States are compared with their sha256 when they are first read, before anybody gets their values: nothing waits
    until a whole store is hashed.

    Attributes:
        device: where 8-bit states are decoded.
    """

    folder: Path
    layout: StoreLayout
    _sha256: tuple[str, ...]
    device: torch.device = _CPU
    _shards: dict[int, _Shard] = attrs.field(init=False, factory=dict)
    # [N] bool, whether the conversation's states were compared; and shards that were hashed whole.
    _intact: np.ndarray = attrs.field(init=False, repr=False)
    _whole: set[int] = attrs.field(init=False, factory=set)

    @_intact.default
    def _none_compared(self) -> np.ndarray:
        return np.zeros(len(self.layout.lengths), np.bool_)

    @classmethod
    def open(
        cls, folder: Path, *, key: str | None = None, check: Check = "headers", device: torch.device = _CPU
    ) -> StateStore:
        """Opens a store.

        Args:
            folder: the folder that the writer filled.
            key: fingerprint that the states must have; None accepts any.
            check: "headers" checks every shard's size and header; "all" hashes every shard, too; "none" leaves each
                shard to the first read from it.
            device: where 8-bit states are decoded.

        Raises:
            DamagedShards: names the shards that must be captured again.
            ArtifactError: the store is incomplete, or holds states of different inputs.
        """
        manifest = read_manifest(folder)
        layout = StoreLayout.from_json(read_record(folder / LAYOUT))
        if key is not None and layout.key != key:
            raise ArtifactError(f"{folder}: states of different inputs (its key is {layout.key}, expected {key})")
        store = cls(folder, layout, tuple(shard["sha256"] for shard in manifest["shards"]), device)
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
        """Reads the states of one conversation: hidden_states [n, A*H] and last [n, H].

        They have the stored type, and are on the CPU; those stored in 8 bits are float32, and on `device`.

        Raises:
            DamagedShards: they are not what was written.
        """
        number, row = self.layout.places[index].tolist()
        shard = self._shards.get(number) or self._open_shard(number)
        length = int(self.layout.lengths[index])
        parts = tuple(self._read(part, number, shard.first_bytes[part.name], row, length) for part in self.layout.parts)
        if not self._intact[index]:
            if shard.digests is None:
                self._hash(number)
            elif bytes.fromhex(states_digest(*parts)) != self._digest(shard.digests, number, index):
                raise DamagedShards(self.folder, {number: f"the states of conversation {index} have another sha256"})
            self._intact[index] = True
        return self.layout.decode(parts, self.device)

    def states(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Reads the states of several conversations."""
        return [self.read(index) for index in indices]

    def _digest(self, digests: bytes, number: int, index: int) -> bytes:
        place = int(np.flatnonzero(self.layout.shards[number] == index)[0])
        return digests[DIGEST_BYTES * place : DIGEST_BYTES * (place + 1)]

    def _open_shard(self, number: int) -> _Shard:
        checked = check_shard(self.folder, self.layout, number)
        if isinstance(checked, str):
            raise DamagedShards(self.folder, {number: checked})
        try:
            note = read_record(note_file(self.folder, number))
        except ArtifactError as error:
            raise DamagedShards(self.folder, {number: "its note is unreadable"}) from error
        digests = note.get("conversations")
        self._shards[number] = _Shard(checked, None if digests is None else bytes.fromhex("".join(digests)))
        return self._shards[number]

    def _hash(self, number: int) -> None:
        """Hashes a whole shard, unless that is done: earlier versions kept no digest of each conversation."""
        if number not in self._whole:
            checked = check_shard(self.folder, self.layout, number, sha256=self._sha256[number])
            if isinstance(checked, str):
                raise DamagedShards(self.folder, {number: checked})
            self._whole.add(number)

    def _read(self, part: Part, number: int, first_byte: int, row: int, length: int) -> torch.Tensor:
        torch_type, numpy_type, _ = DTYPES[part.dtype]
        offset, shape = first_byte + row * part.row_bytes, (length, part.columns)
        values = read_part(self.folder / shard_name(number), numpy_type, offset=offset, shape=shape)
        return torch.from_numpy(values).view(torch_type)


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
    rows = layout.rows(number)
    for part in layout.parts:
        entry = header.get(part.name, {})
        if entry.get("shape") != [rows, part.columns] or entry.get("dtype") != DTYPES[part.dtype][2]:
            return f"its header does not describe {rows} tokens"
    # safetensors: 8 bytes with the header's length, the header, then the tensors without gaps.
    expected = 8 + length + layout.bytes_for(rows)
    if size != expected:
        return f"{size} bytes instead of {expected}"
    if sha256 is not None and file_sha256(path) != sha256:
        return "its sha256 is not the one recorded when it was written"
    return {part.name: 8 + length + header[part.name]["data_offsets"][0] for part in layout.parts}
