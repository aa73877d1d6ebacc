"""Where the documents of a packed row lie, known on the host so that no step has to ask the device.

Several documents are packed into one row of S places. They never see each other: attention, targets and draft blocks
all work on the document bounds kept here.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

# Decorator for index arithmetic on the host: it computes real values even while a model is traced with fake tensors.
on_host = unset_fake_temporarily


@attrs.frozen
class Segment:
    """The part of one document that a pass computes.

    Queries are the rows [first, stop), keys the rows [start, stop). A query sees its document's rows up to itself.
    """

    start: int
    first: int
    stop: int


@attrs.frozen(eq=False)
class RowLayout:
    """The documents of a packed row of S places, and which of its places are supervised.

    Attributes:
        size: S.
        documents: (start, stop) of each document, in order; padding belongs to none.
        supervised: for each document, its first and last supervised place, or None.
        places: [N] int64 on the host, the supervised places.
        place_starts: [N] int64 on the host, where the document of each supervised place starts.
    """

    size: int
    documents: tuple[tuple[int, int], ...]
    supervised: tuple[tuple[int, int] | None, ...]
    places: torch.Tensor
    place_starts: torch.Tensor

    @classmethod
    def of(cls, document_ids: torch.Tensor, loss_mask: torch.Tensor) -> RowLayout:
        """Reads the layout off `document_ids` [1, S] (-1 is padding) and `loss_mask` [1, S]; waits for their device."""
        ids, mask = document_ids[0].cpu(), loss_mask[0].cpu()
        # A document ends wherever the id changes.
        edges = (torch.nonzero(ids[1:] != ids[:-1])[:, 0] + 1).tolist()
        bounds = list(zip([0, *edges], [*edges, len(ids)], strict=True)) if len(ids) else []
        documents = tuple((start, stop) for start, stop in bounds if ids[start] >= 0)
        spans: list[tuple[int, int] | None] = []
        places, starts = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for start, stop in documents:
            own = start + torch.nonzero(mask[start:stop])[:, 0]
            spans.append((int(own[0]), int(own[-1])) if len(own) else None)
            places.append(own)
            starts.append(torch.full_like(own, start))
        return cls(len(ids), documents, tuple(spans), torch.cat(places), torch.cat(starts))

    def without_padding(self, *tensors: torch.Tensor) -> tuple[RowLayout, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Cuts out the places that belong to no document.

        Args:
            tensors: [S, ...] each.

        Returns:
            The layout of the kept places, their indices [S'], and the tensors cut to them.
        """
        kept = rows_of(self.whole(), tensors[0].device)
        if len(kept) == self.size:
            return self, kept, tensors
        lengths = [stop - start for start, stop in self.documents]
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        # How far each document moves to the left, by its old start.
        moved = {old[0]: old[0] - new for old, new in zip(self.documents, ends, strict=False)}
        spans = tuple(
            None if span is None else (span[0] - moved[start], span[1] - moved[start])
            for (start, _), span in zip(self.documents, self.supervised, strict=True)
        )
        shifts = torch.tensor([moved[start] for start in self.place_starts.tolist()], dtype=torch.int64)
        documents = tuple(pairwise(ends))
        layout = RowLayout(ends[-1], documents, spans, self.places - shifts, self.place_starts - shifts)
        return layout, kept, tuple(tensor[kept] for tensor in tensors)

    def whole(self) -> tuple[Segment, ...]:
        """Makes every row of every document a query."""
        return tuple(Segment(start, start, stop) for start, stop in self.documents)

    def reaching(self, nearest: int, farthest: int) -> tuple[Segment, ...]:
        """Selects the rows r that have a supervised place between r + nearest and r + farthest.

        Yields one segment per document, from the first such row to the last; rows between two supervised turns are
        kept, since cutting them out would split a document into segments with shared keys.
        """
        segments = []
        for (start, _), span in zip(self.documents, self.supervised, strict=True):
            if span is None or span[1] - nearest < start:
                continue
            segments.append(Segment(start, max(start, span[0] - farthest), span[1] - nearest + 1))
        return tuple(segments)


@attrs.frozen(eq=False)
class PackedRow:
    """A packed row of S' places as a model computes with it: the S places that belong to a document.

    Attributes:
        layout: of the S places.
        kept: [S] int64, their indices in the packed row.
        padded_size: S'.
        tokens: [S] int64.
        positions: [S] int64, place in the document.
    """

    layout: RowLayout
    kept: torch.Tensor
    padded_size: int
    tokens: torch.Tensor
    positions: torch.Tensor

    @classmethod
    def of(
        cls,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        loss_mask: torch.Tensor | None = None,
        layout: RowLayout | None = None,
        **_: Any,
    ) -> PackedRow:
        """Reads the batch that `forward` and `replay` receive, by its names; [1, S'] each, other names are ignored.

        Args:
            loss_mask: None supervises nothing, as in replay.
            layout: of the padded row, where the caller knows it; None reads it off the tensors.
        """
        if layout is None:
            mask = torch.zeros_like(document_ids, dtype=torch.bool) if loss_mask is None else loss_mask
            layout = RowLayout.of(document_ids, mask)
        inner, kept, (tokens, positions) = layout.without_padding(input_ids[0], position_ids[0])
        # Values that only some algorithms read are cut later, by `cut`.
        return cls(inner, kept, layout.size, tokens, positions)

    def cut(self, values: torch.Tensor) -> torch.Tensor:
        """Drops the padding: [1, S', ...] -> [S, ...]."""
        return values[0] if len(self.kept) == self.padded_size else values[0][self.kept]

    def padded(self, values: torch.Tensor) -> torch.Tensor:
        """Puts the padding back as zeros: [S, ...] -> [S', ...] float32."""
        whole = torch.zeros(self.padded_size, *values.shape[1:], device=values.device)
        whole[self.kept] = values
        return whole


@on_host()
def rows_of(segments: tuple[Segment, ...], device: torch.device) -> torch.Tensor:
    """Lists the query rows of `segments` in order, [R] int64."""
    rows = [torch.arange(segment.first, segment.stop) for segment in segments]
    return torch.cat(rows).to(device, non_blocking=True) if rows else torch.zeros(0, dtype=torch.int64, device=device)
