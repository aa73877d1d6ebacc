"""Fills a hidden-state store shard by shard; complete shards survive a kill at any moment."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import attrs
import safetensors.torch
import torch

from speculators.data.background import BackgroundCalls
from speculators.data.batches import StateSource
from speculators.data.encoded import Conversations
from speculators.data.shard_files import LocalFiles
from speculators.data.state_types import DTYPES, from_stored, to_stored
from speculators.data.store import StateStore, check_shard, note_file, shard_name, states_digest
from speculators.data.store_layout import LAYOUT, StoreLayout
from speculators.errors import ArtifactError, DataError
from speculators.events import Progress, ProgressEvent, ignore
from speculators.files.disk import disk_errors, write_json, write_whole
from speculators.files.folders import FORMAT, MANIFEST, read_record, write_manifest

# Maps token rows ([n] int64 each) to (place in the list, hidden_states [n, A*H], last [n, H]), in any order.
Capture = Callable[[list[torch.Tensor]], Iterable[tuple[int, torch.Tensor, torch.Tensor]]]
# Takes (index, token row) whenever it has room for more; yields (index, hidden_states, last) in any order.
Stream = Callable[[Iterator[tuple[int, torch.Tensor]]], Iterable[tuple[int, torch.Tensor, torch.Tensor]]]


# Takes the number of a shard and its `stored_parts`.
Write = Callable[[int, tuple[torch.Tensor, ...]], None]


class StateWriter:
    """Writes a store, or continues one that was interrupted or damaged.

    A shard counts once its note (`states-00000.json`, with its sha256) exists, which is written after the shard.

    Args:
        folder: the store's folder; existing shards of the same layout are kept. Their sizes and headers are checked
            here, their states when they are read.
        layout: what the store will hold.
        missing: the shards that the store lacks, if the caller has just checked; None checks all existing shards.
        progress: gets an event for each checked shard.

    Attributes:
        damaged: the fault of each damaged shard that had been complete, by shard number.

    Raises:
        ArtifactError: the folder holds another layout, or the disk has no room for the missing shards.
    """

    def __init__(
        self, folder: Path, layout: StoreLayout, *, missing: Iterable[int] | None = None, progress: Progress = ignore
    ) -> None:
        self.folder, self.layout = folder, layout
        self.damaged: dict[int, str] = {}
        self._buffers: dict[int, tuple[tuple[torch.Tensor, ...], set[int]]] = {}
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if (folder / LAYOUT).exists():
            if read_record(folder / LAYOUT) != layout.to_json():
                raise ArtifactError(f"{folder}: holds states of different inputs", hint="remove the folder")
        else:
            write_json(folder / LAYOUT, layout.to_json())
        if missing is None:
            self._missing = set(self._check(progress))
        else:
            unnoted = (n for n in range(len(layout.shards)) if not note_file(folder, n).exists())
            self._missing = {*missing, *unnoted}
        if self._missing:
            # An earlier manifest would call the store complete while a damaged shard is still being captured again.
            (folder / MANIFEST).unlink(missing_ok=True)
        self._check_room()

    def _check(self, progress: Progress) -> Iterator[int]:
        """Yields the shards that are missing or damaged."""
        for number in range(len(self.layout.shards)):
            if not self._is_whole(number):
                yield number
            else:
                # Without a total: the one of this stage counts the tokens that are still to be captured.
                note = f"checked {shard_name(number)} of {len(self.layout.shards)}"
                progress(ProgressEvent(stage="capture", done=number + 1, unit="shards", note=note))

    def _is_whole(self, number: int) -> bool:
        note = note_file(self.folder, number)
        if not note.exists():
            return False
        try:
            read_record(note)
            checked = check_shard(LocalFiles(self.folder), self.layout, number)
        except ArtifactError:
            checked = "its note is unreadable"
        if isinstance(checked, str):
            self.damaged[number] = checked
            note.unlink()
        return not isinstance(checked, str)

    def _check_room(self) -> None:
        needed = self.layout.bytes_for(sum(self.layout.rows(number) for number in self._missing))
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            sizes = f"need {needed / 1e9:.1f} GB more, and the disk has {free / 1e9:.1f} GB free"
            raise ArtifactError(
                f"{self.folder}: the hidden states {sizes}",
                hint='set data.hidden_states = "online", or take fewer conversations',
            )

    def missing(self, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """Lists the shards that process `rank` of `world_size` has yet to write."""
        return sorted(self._missing)[rank::world_size]

    def append(self, index: int, parts: tuple[torch.Tensor, ...], *, write: Write | None = None) -> None:
        """Adds one conversation, in any order; a shard is written once all its conversations are there.

        Args:
            index: of the conversation.
            parts: its states as the layout encodes them.
            write: takes the arguments of `self.write` for a full shard; None writes it at once.

        Raises:
            DataError: the states and the conversation differ in length, or are not finite in the stored type.
            ArtifactError: the disk is full; no half-written shard is left.
        """
        number, row = self.layout.places[index].tolist()
        length = int(self.layout.lengths[index])
        if any(len(part) != length for part in parts):
            raise DataError(
                f"conversation {index} has {length} tokens, but {len(parts[0])} states were captured",
                hint="a prefix cache in the capturing engine causes this: switch it off",
            )
        if number not in self._buffers:
            self._buffers[number] = self._buffer(number)
        buffers, arrived = self._buffers[number]
        for buffer, part in zip(buffers, parts, strict=True):
            buffer[row : row + length] = part
            # torch has no such test for 8 bits: there the scales tell.
            if part.dtype.itemsize > 1 and not torch.isfinite(part).all():
                hint = 'float16 overflows above 65504: set data.states_dtype = "bfloat16"'
                raise DataError(f"conversation {index}: its states are not finite in {self.layout.dtype}", hint=hint)
        arrived.add(index)
        if len(arrived) == len(self.layout.shards[number]):
            del self._buffers[number]
            (write or self.write)(number, buffers)

    def _buffer(self, number: int) -> tuple[tuple[torch.Tensor, ...], set[int]]:
        rows, parts = self.layout.rows(number), self.layout.parts
        return tuple(torch.empty(rows, part.columns, dtype=DTYPES[part.dtype][0]) for part in parts), set()

    def write(self, number: int, parts: tuple[torch.Tensor, ...]) -> None:
        """Writes a full shard, and then its note.

        Raises:
            ArtifactError: the disk is full; no half-written shard is left.
        """
        lengths = self.layout.lengths[self.layout.shards[number]].tolist()
        digests = map(states_digest, *(part.split(lengths) for part in parts))
        named = {part.name: tensor for part, tensor in zip(self.layout.parts, parts, strict=True)}
        content = safetensors.torch.save(named, metadata={"key": self.layout.key})
        write_whole(self.folder / shard_name(number), content)
        note = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "conversations": list(digests)}
        write_json(note_file(self.folder, number), {"format": FORMAT, **note})
        self._missing.discard(number)

    def finish(self) -> StateStore:
        """Writes the manifest, once all processes have written their shards, and opens the store."""
        shards = []
        for number in range(len(self.layout.shards)):
            note = read_record(note_file(self.folder, number))
            shards.append({"file": shard_name(number), "sha256": note["sha256"], "bytes": note["bytes"]})
        for left in self.folder.glob("*.tmp"):
            left.unlink()
        tokens = int(self.layout.lengths.sum())
        write_manifest(self.folder, {"key": self.layout.key, "tokens": tokens, "shards": shards})
        return StateStore.open(self.folder)


def fill(
    writer: StateWriter,
    conversations: Conversations,
    capture: Capture,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = ignore,
) -> None:
    """Captures the shards that a store lacks one by one, so that memory holds one shard.

    Args:
        conversations: their tokens are fed to the verifier.
        capture: the verifier (`Engine.capture_all` with its layer ids bound).
        rank, world_size: each process takes every `world_size`-th missing shard.
        progress: gets an event after each conversation.
    """
    missing = writer.missing(rank=rank, world_size=world_size)
    meter = _Speedometer(sum(map(writer.layout.rows, missing)), progress)
    with _appending(writer) as append:
        for number in missing:
            members = writer.layout.shards[number].tolist()
            rows = [token_row(conversations, index) for index in members]
            for place, hidden_states, last in capture(rows):
                append(members[place], hidden_states, last)
                meter.add(len(last))


def fill_stream(
    writer: StateWriter,
    conversations: Conversations,
    stream: Stream,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Progress = ignore,
) -> None:
    """Captures the shards that a store lacks with an engine that works on many conversations at once.

    It does not wait for one shard before it begins the next: towards the end of each shard the engine would run out of
    work. Memory therefore holds every shard that is begun.

    Args:
        stream: gets the conversations in the order of the shards.
        writer, conversations, rank, world_size, progress: as for `fill`.
    """
    missing = writer.missing(rank=rank, world_size=world_size)
    meter = _Speedometer(sum(map(writer.layout.rows, missing)), progress)
    members = (index for number in missing for index in writer.layout.shards[number].tolist())
    with _appending(writer) as append:
        for index, hidden_states, last in stream((index, token_row(conversations, index)) for index in members):
            append(index, hidden_states, last)
            meter.add(len(last))


@contextmanager
def _appending(writer: StateWriter) -> Iterator[Callable[[int, torch.Tensor, torch.Tensor], None]]:
    """Yields what takes a conversation's states; the verifier goes on while they are checked and shards are written.

    One thread rounds and checks states, a second one hashes and writes full shards.
    """
    with (
        BackgroundCalls(writer.write, waiting=1) as write,
        BackgroundCalls(partial(_append, writer, write)) as appended,
    ):

        def append(index: int, hidden_states: torch.Tensor, last: torch.Tensor) -> None:
            appended(index, *_host_copies(writer.layout, hidden_states, last))

        yield append


def _append(
    writer: StateWriter,
    write: Write,
    index: int,
    states: tuple[torch.Tensor, ...],
    copied: torch.cuda.Event | None,
) -> None:
    if copied is not None:
        copied.synchronize()
    parts = writer.layout.encode(*states) if copied is None else states
    writer.append(index, parts, write=write)


def _host_copies(
    layout: StoreLayout, states: torch.Tensor, last: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], torch.cuda.Event | None]:
    """Rounds states on a GPU and copies them into pinned memory without waiting; returns what says when they are there.

    States that are on the host stay as they are: the thread that takes them rounds them.
    """
    if not states.is_cuda:
        return (states, last), None
    # Pinned because it is not waited for.
    host = tuple(part.to("cpu", non_blocking=True) for part in layout.encode(states, last))
    return host, torch.cuda.current_stream(states.device).record_event()


def token_row(conversations: Conversations, index: int) -> torch.Tensor:
    """Reads a conversation's token ids, [n] int64."""
    return torch.from_numpy(conversations.row(index).input_ids).long()


class _Speedometer:
    """Reports how many of all tokens are done, and how fast."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._total, self._progress = total, progress
        self._done, self._start = 0, time.monotonic()

    def add(self, tokens: int) -> None:
        self._done += tokens
        note = f"{self._done / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s"
        event = ProgressEvent(stage="capture", done=self._done, total=self._total, unit="tokens", note=note)
        self._progress(event)


@attrs.frozen(eq=False)
class OnlineStates(StateSource):
    """Computes states on demand; as a `StateSource` it gives the same values as a store of the same type."""

    conversations: Conversations
    capture: Capture
    dtype: str

    def states(self, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Captures hidden_states [n, A*H] and last [n, H] of each conversation."""
        rows = [token_row(self.conversations, index) for index in indices]
        captured = {place: (states, last) for place, states, last in self.capture(rows)}
        # Rounded to the stored type, so that training sees the same values as from a store.
        parts = [to_stored(*captured[place], self.dtype) for place in range(len(rows))]
        return [from_stored(each, each[0].device) for each in parts]
