"""The hidden-state store: which shard holds what, and reading it through memory maps."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch

from speculators.data.parts import read_part
from speculators.errors import ArtifactError
from speculators.files.disk import file_sha256
from speculators.files.folders import FORMAT, read_manifest, read_record

LAYOUT = "layout.json"
SHARD_TOKENS = 8192
STATES, LAST = "hidden_states", "last"

# name in the recipe: (torch type, numpy type of the same width, name in a safetensors header)
DTYPES: dict[str, tuple[torch.dtype, Any, str]] = {
    "bfloat16": (torch.bfloat16, np.int16, "BF16"),
    "float16": (torch.float16, np.int16, "F16"),
    "float32": (torch.float32, np.int32, "F32"),
}


class DamagedShards(ArtifactError):
    """Shards that are missing, cut short or altered.

    Attributes:
        shards: their numbers; only these need to be captured again.
    """

    def __init__(self, folder: Path, problems: dict[int, str]) -> None:
        self.shards = tuple(problems)
        listed = ", ".join(f"{shard_name(number)} ({what})" for number, what in problems.items())
        super().__init__(f"{folder}: damaged: {listed}", hint="run again: only these shards are captured again")


def shard_name(number: int) -> str:
    """Returns the file name of shard `number`."""
    return f"states-{number:05d}.safetensors"


def plan_shards(lengths: Sequence[int], shard_tokens: int) -> tuple[tuple[int, ...], ...]:
    """Returns the conversations of each shard, in the order of their length.

    A pure function: a shard that is captured again, after a kill or a damage, has the same conversations in the same
    order and so is computed in the same batches. Similar lengths stand together because they batch without padding.
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
    """What a store holds, known before anything is captured.

    Attributes:
        key: fingerprint of what the states were computed from; a store with another key is never read.
        lengths: tokens of each conversation.
        aux_width: A*H, columns of the auxiliary states.
        width: H, columns of the last layer's state.
        dtype: "bfloat16", "float16" or "float32".
        shard_tokens: tokens a shard (a longer conversation has a shard of its own).
        shards: the conversations of each shard, in their order there.
        places: [N, 2] int64, each conversation's shard and first row in it.
    """

    key: str
    lengths: tuple[int, ...] = attrs.field(converter=_ints)
    aux_width: int
    width: int
    dtype: str = attrs.field(validator=attrs.validators.in_(DTYPES))
    shard_tokens: int = SHARD_TOKENS
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
        """Returns the tokens of a shard."""
        return sum(self.lengths[index] for index in self.shards[shard])

    def bytes_for(self, tokens: int) -> int:
        """Returns the size on disk of the states of so many tokens."""
        return store_bytes(tokens, aux_width=self.aux_width, width=self.width, dtype=self.dtype)

    def to_json(self) -> dict[str, Any]:
        """Returns what the store's `layout.json` says."""
        plain = attrs.asdict(self, filter=lambda field, _: field.init)
        return {"format": FORMAT, **plain, "lengths": list(self.lengths)}

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> StoreLayout:
        """Inverse of `to_json`."""
        return cls(**{field.name: held[field.name] for field in attrs.fields(cls) if field.init})


def store_bytes(tokens: int, *, aux_width: int, width: int, dtype: str) -> int:
    """Returns the size on disk of the states of so many tokens, for a plan that tells it beforehand."""
    return tokens * (aux_width + width) * DTYPES[dtype][0].itemsize


@attrs.frozen(eq=False)
class StateStore:
    """A complete store; a `StateSource` for training.

    Attributes:
        layout: what it holds.
    """

    folder: Path
    layout: StoreLayout
    _first_bytes: tuple[dict[str, int], ...]

    @classmethod
    def open(cls, folder: Path, *, key: str | None = None, verify: bool = False) -> StateStore:
        """Opens a store after a look at every shard's size and header.

        Args:
            folder: what the writer was given.
            key: what the states must have been computed from; None for any.
            verify: compare each shard's sha256 too, which reads the whole store.

        Raises:
            DamagedShards: names the shards that must be captured again.
            ArtifactError: the store is incomplete, or was computed from something else.
        """
        manifest = read_manifest(folder)
        layout = StoreLayout.from_json(read_record(folder / LAYOUT))
        if key is not None and layout.key != key:
            raise ArtifactError(f"{folder}: states of other inputs (its key is {layout.key}, wanted {key})")
        problems: dict[int, str] = {}
        first_bytes = []
        for number, held in enumerate(manifest["shards"]):
            found = check_shard(folder, layout, number, sha256=held["sha256"] if verify else None)
            if isinstance(found, str):
                problems[number] = found
            else:
                first_bytes.append(found)
        if problems:
            raise DamagedShards(folder, problems)
        return cls(folder, layout, tuple(first_bytes))

    def read(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the states of one conversation: hidden_states [n, A*H] and last [n, H], in the stored type."""
        shard, row = self.layout.places[index].tolist()
        return (
            self._part(shard, row, STATES, (self.layout.lengths[index], self.layout.aux_width)),
            self._part(shard, row, LAST, (self.layout.lengths[index], self.layout.width)),
        )

    def states(self, indices: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns the states of several conversations."""
        return [self.read(index) for index in indices]

    def _part(self, shard: int, row: int, name: str, shape: tuple[int, int]) -> torch.Tensor:
        torch_type, numpy_type, _ = DTYPES[self.layout.dtype]
        offset = self._first_bytes[shard][name] + row * shape[1] * torch_type.itemsize
        part = read_part(self.folder / shard_name(shard), numpy_type, offset=offset, shape=shape)
        return torch.from_numpy(part).view(torch_type)


def check_shard(folder: Path, layout: StoreLayout, number: int, *, sha256: str | None = None) -> dict[str, int] | str:
    """Returns at which byte of a shard's file each tensor starts, or what is wrong with the file.

    Args:
        folder: the store's.
        layout: what the shard should hold.
        number: the shard.
        sha256: compare the file's digest with this; None looks at size and header only.
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
        held = header.get(name, {})
        if held.get("shape") != [rows, columns] or held.get("dtype") != kind:
            return f"its header does not describe {rows} tokens"
    wanted = 8 + length + layout.bytes_for(rows)
    if size != wanted:
        return f"{size} bytes instead of {wanted}"
    if sha256 is not None and file_sha256(path) != sha256:
        return "its sha256 is not the one that was written"
    return {name: 8 + length + header[name]["data_offsets"][0] for name in (STATES, LAST)}
