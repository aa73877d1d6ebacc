"""Which row drafts which place, and how drafts are counted.

Row r knows the verifier's states up to place r and the tokens up to r + 1. Depth k (from 0) of row r drafts place r + 2
+ k: the verifier's own head already gives r + 1. A place is supervised if the loss mask says so; its target is the
verifier's distribution there, which comes from the state one place before.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from speculators.nn.layout import RowLayout, Segment, on_host, rows_of


def predicting_rows(layout: RowLayout, depths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the row that predicts each supervised place at each depth, on the host.

    Returns:
        rows: [K, N] int64, place - 2 - k.
        valid: [K, N] bool, whether that row lies in the place's document; the others are set to row 0.
    """
    rows = layout.places[None] - 2 - torch.arange(depths)[:, None]  # [K, N]
    return rows.clamp_min(0), rows >= layout.place_starts[None]


def query_index(layout: RowLayout, segments: tuple[Segment, ...]) -> torch.Tensor:
    """Maps each row to its place among the query rows of `segments`, [S] int64 on the host; 0 for other rows."""
    queries = rows_of(segments, torch.device("cpu"))
    index = torch.zeros(max(layout.size, 1), dtype=torch.int64)
    index[queries] = torch.arange(len(queries))
    return index


def wanted_states(last: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Picks the verifier's states [N, H] that give its distributions of `places` [N]: those one place before."""
    return last[(places - 1).clamp_min(0)]


def depth_weights(weights: list[float], valid: torch.Tensor) -> torch.Tensor:
    """Spreads one weight per depth over places [K, N]: divided by N, and 0 where no row predicts the place."""
    by_depth = torch.tensor(weights).to(valid.device, non_blocking=True)
    return by_depth[:, None] * valid / max(valid.shape[1], 1)


def running_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums each row up to every column, [..., K] -> [..., K], K at least 1, in one order on every device.

    The bits are those of the CPU's cumsum, which sums in float64, too; CUDA's may differ from one call to the next.
    """
    return torch.stack(list(accumulate(values.double().unbind(-1))), -1).to(values.dtype)


def until_failure(
    right: torch.Tensor, row: torch.Tensor, depth: torch.Tensor, *, rows: int, depths: int
) -> torch.Tensor:
    """Marks the drafts up to and including the first wrong one of their row (AUF, arXiv 2607.01893), [M] bool.

    A round ends where a draft fails, so it never needs what that row drafts behind. Drafts that are not listed, of
    places that are not supervised, count as right.

    Args:
        right: [M] bool, on the device as all others.
        row: [M] int64 below `rows`, the row, or block, of each draft.
        depth: [M] int64 below `depths`.
    """
    place = row * depths + depth
    # Counted in integers: a float cumsum on CUDA is not deterministic.
    none = torch.zeros(rows * depths, dtype=torch.int64, device=right.device)
    wrong = none.index_copy(0, place, (~right).long()).view(rows, depths)
    before = wrong.cumsum(1) - wrong
    return before.flatten()[place] == 0


def chain_metrics(
    loss: torch.Tensor, right: torch.Tensor, rows: torch.Tensor, valid: torch.Tensor, size: int
) -> dict[str, torch.Tensor]:
    """Measures accuracy by depth.

    `accuracy_k` counts a row at depth k as right if all its depths up to k are; `conditional_k` is the same share among
    the rows that were right up to depth k - 1.

    Args:
        loss: of the row.
        right: [K, N] bool, the draft of place n at depth k is the verifier's.
        rows: [K, N] int64 below `size`, the row it was drafted from.
        valid: [K, N] bool, there is such a row.
        size: number of rows.
    """
    metrics = {"loss": loss.detach()}
    # Entries to ignore are marked in a slot past the last row: a boolean index would wait for the device.
    blank = torch.zeros(size + 1, dtype=torch.bool, device=right.device)
    reached = supervised = None
    for depth, (hit, row, ok) in enumerate(zip(right & valid, rows, valid, strict=True)):
        tried, good = (blank.index_fill(0, torch.where(mark, row, size), True)[:size] for mark in (ok, hit))
        # Rows that could be scored at every depth so far, and rows that were right at every depth so far.
        supervised = tried if supervised is None else tried & supervised
        before = supervised if reached is None else reached & supervised
        reached = good & before
        metrics[f"accuracy_{depth + 1}"] = reached.sum() / supervised.sum().clamp_min(1)
        metrics[f"conditional_{depth + 1}"] = reached.sum() / before.sum().clamp_min(1)
    return metrics


@on_host()
def drafted_places(layout: RowLayout, rows: torch.Tensor, depths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Selects the drafts that predict a supervised place in the document of their row; all on the host.

    Args:
        rows: [E] int64, the row of each draft.
        depths: [E] int64 from 0; place row + 2 + depth is drafted.

    Returns:
        drafts: [M] int64, indices of the selected drafts.
        place: [M] int64, index of the supervised place that each predicts.
    """
    # One slot past the end catches drafts that leave the row.
    document = torch.full((layout.size + 1,), -1)
    for index, (start, stop) in enumerate(layout.documents):
        document[start:stop] = index
    supervised = torch.full((layout.size + 1,), -1)
    supervised[layout.places] = torch.arange(len(layout.places))
    target = (rows + 2 + depths).clamp_max(layout.size)
    drafts = torch.nonzero((supervised[target] >= 0) & (document[target] == document[rows]))[:, 0]
    return drafts, supervised[target[drafts]]


def drawn_metrics(
    loss: torch.Tensor, right: torch.Tensor, layout: RowLayout, depths: int, depth: torch.Tensor, place: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Measures the accuracies of `chain_metrics` where only some (depth, place) pairs were drafted.

    Args:
        right: [M] bool, on the device.
        depths: K.
        depth: [M] int64 below K, on the host.
        place: [M] int64 on the host, index of the supervised place that each draft predicts.
    """
    rows, valid, flat = _drawn_grid(layout, depths, depth, place)
    device = right.device
    flat = flat.to(device, non_blocking=True)
    hit = torch.zeros(valid.numel(), dtype=torch.bool, device=device).index_copy_(0, flat, right).view(valid.shape)
    rows, valid = rows.to(device, non_blocking=True), valid.to(device, non_blocking=True)
    return chain_metrics(loss, hit, rows, valid, layout.size)


@on_host()
def _drawn_grid(
    layout: RowLayout, depths: int, depth: torch.Tensor, place: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lays drafts out on the [K, N] grid: rows, which entries were drawn, and the flat index [M] of each draft."""
    rows, _ = predicting_rows(layout, depths)
    valid = torch.zeros(depths, len(layout.places), dtype=torch.bool)
    valid[depth, place] = True
    return rows, valid, depth * len(layout.places) + place
