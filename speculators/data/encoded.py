"""Reads prepared conversations, as tokens with their loss mask, from a folder of memory-mapped files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from speculators.data.parts import read_part
from speculators.errors import ArtifactError
from speculators.files.folders import verify as verify_files

TOKENS, MASK, OFFSETS, SUPERVISED, COUNTS, IDS = (
    "tokens.i32",
    "loss_mask.u8",
    "offsets.npy",
    "supervised.npy",
    "counts.npy",
    "ids.txt",
)


@attrs.frozen(eq=False)
class Encoded:
    """A conversation as the verifier sees it, or the part of it that one answer needs.

    Attributes:
        input_ids: [n] int32.
        loss_mask: [n] bool; place t says whether token t is supervised, although it is predicted at place t - 1.
        truncated: its end was cut off.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    truncated: bool = False


def row_names(name: str, count: int) -> list[str]:
    """Names the rows of a conversation: by its id, or "id#1", "id#2", ... if it has several."""
    return [name] if count == 1 else [f"{name}#{number}" for number in range(1, count + 1)]


@attrs.frozen(eq=False)
class Conversations:
    """The prepared conversations of a run, as `prepare` wrote them.

    A conversation is one row, or several if the chat template shows its history otherwise than it was written.

    Attributes:
        lengths: [N] int64, number of tokens of each row.
        supervised: [N] int64, number of supervised tokens of each row.
        manifest: counts, reasons and hashes; see the properties.
    """

    folder: Path
    lengths: np.ndarray
    supervised: np.ndarray
    manifest: Mapping[str, Any]
    _starts: np.ndarray

    @classmethod
    def open(cls, folder: Path, *, key: str | None = None, verify: bool = False) -> Conversations:
        """Opens a prepared folder.

        Args:
            folder: the folder that `prepare` wrote.
            key: fingerprint of the stage that must have made it; None accepts any.
            verify: compare the sha256 of every file, not only its size.

        Raises:
            ArtifactError: the folder is missing, incomplete, damaged or made for different inputs; names the file.
        """
        manifest = verify_files(folder, hashes="all" if verify else "none")
        if key is not None and manifest["key"] != key:
            raise ArtifactError(f"{folder}: made for different inputs (its key is {manifest['key']}, expected {key})")
        offsets = np.load(folder / OFFSETS)
        return cls(folder, np.diff(offsets), np.load(folder / SUPERVISED), manifest, offsets[:-1])

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> Encoded:
        """Reads row `index`, and no other part of the files."""
        start, shape = int(self._starts[index]), (int(self.lengths[index]),)
        tokens = read_part(self.folder / TOKENS, np.int32, offset=4 * start, shape=shape)
        mask = read_part(self.folder / MASK, np.uint8, offset=start, shape=shape)
        return Encoded(tokens, mask.view(np.bool_))

    def token_counts(self) -> np.ndarray:
        """Reads how often each token of the verifier's vocabulary is supervised: [V] int64."""
        counts: np.ndarray = np.load(self.folder / COUNTS)
        return counts

    def ids(self) -> list[str]:
        """Reads the names of the rows, in order: `row_names` of their conversations."""
        return (self.folder / IDS).read_text(encoding="utf-8").split("\n")

    @cached_property
    def _name_ends(self) -> np.ndarray:
        """[N] int64, where each name ends in its file."""
        content = np.fromfile(self.folder / IDS, np.uint8)
        return np.append(np.flatnonzero(content == ord("\n")), len(content))

    def names(self, indices: Iterable[int]) -> tuple[str, ...]:
        """Reads the names of some rows: all of them as text would take 100 MB a million in each process."""
        return tuple(map(self._name, indices))

    def _name(self, index: int) -> str:
        start, end = int(self._name_ends[index - 1]) + 1 if index else 0, int(self._name_ends[index])
        return read_part(self.folder / IDS, np.uint8, offset=start, shape=(end - start,)).tobytes().decode()

    @property
    def conversations(self) -> int:
        """The number of conversations, each of which has a row or more."""
        return int(self.manifest["conversations"])

    @property
    def fingerprint(self) -> str:
        """The sha256 of the tokens and masks themselves."""
        return str(self.manifest["fingerprint"])

    @property
    def skipped(self) -> dict[str, int]:
        """The number of conversations that could not be used, by reason."""
        return dict(self.manifest["skipped"])

    @property
    def skipped_examples(self) -> dict[str, str]:
        """The id of the first conversation that the template could not encode, by reason."""
        # Folders that predate this field have none.
        return dict(self.manifest["skipped_examples"]) if "skipped_examples" in self.manifest else {}

    @property
    def truncated(self) -> int:
        """The number of conversations that were cut at `max_tokens`."""
        return int(self.manifest["truncated"])

    @property
    def turn_ends(self) -> tuple[int, ...]:
        """The special tokens that end the assistant's turns here, which the draft vocabulary must contain."""
        return tuple(self.manifest["turn_ends"])
