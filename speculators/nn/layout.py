"""Where the documents of a packed row lie, known on the host so that no step has to ask the device."""

from __future__ import annotations

from itertools import pairwise

import attrs
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

# Decorates what works on indices that the host knows: it has values, too, while a model is traced without any.
on_host = unset_fake_temporarily


@attrs.frozen
class Segment:
    """The rows of one document that are worked on.

    Queries are the rows [first, stop), keys the rows [start, stop): a query sees its document's rows up to itself.
    """

    start: int
    first: int
    stop: int


@attrs.frozen(eq=False)
class RowLayout:
    """Documents of a packed row of S places, and the rows that a loss can reach.

    Attributes:
        size: S.
        documents: (start, stop) of each document, in order; padding belongs to none.
        supervised: for each document, the first and the last supervised place, or None.
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
        edges = (torch.nonzero(ids[1:] != ids[:-1])[:, 0] + 1).tolist()
        bounds = list(zip([0, *edges], [*edges, len(ids)], strict=True)) if len(ids) else []
        documents = tuple((start, stop) for start, stop in bounds if ids[start] >= 0)
        spans: list[tuple[int, int] | None] = []
        places, starts = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for start, stop in documents:
            found = start + torch.nonzero(mask[start:stop])[:, 0]
            spans.append((int(found[0]), int(found[-1])) if len(found) else None)
            places.append(found)
            starts.append(torch.full_like(found, start))
        return cls(len(ids), documents, tuple(spans), torch.cat(places), torch.cat(starts))

    def without_padding(self, *tensors: torch.Tensor) -> tuple[RowLayout, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Leaves out the places that belong to no document.

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
        """Returns every document with all its rows as queries."""
        return tuple(Segment(start, start, stop) for start, stop in self.documents)

    def reaching(self, nearest: int, farthest: int) -> tuple[Segment, ...]:
        """Returns the rows r from which a supervised place lies between r + nearest and r + farthest.

        One segment a document, from the first such row to the last; rows between two supervised turns are kept.
        """
        segments = []
        for (start, _), span in zip(self.documents, self.supervised, strict=True):
            if span is None or span[1] - nearest < start:
                continue
            segments.append(Segment(start, max(start, span[0] - farthest), span[1] - nearest + 1))
        return tuple(segments)


@on_host()
def rows_of(segments: tuple[Segment, ...], device: torch.device) -> torch.Tensor:
    """Returns the query rows of `segments` in order, [R] int64."""
    rows = [torch.arange(segment.first, segment.stop) for segment in segments]
    return torch.cat(rows).to(device, non_blocking=True) if rows else torch.zeros(0, dtype=torch.int64, device=device)
