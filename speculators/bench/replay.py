"""Exact acceptance length without decoding: one teacher-forced pass over responses that the verifier itself produced.

Under speculative sampling an emitted token has the verifier's distribution p, and given that it is y its draft was
accepted with probability min(1, q(y) / p(y)); at T = 0 that is 1 if y is the draft's argmax, else 0. If all earlier
drafts of the round were accepted they equal y, so the teacher-forced q is the very one that a live round computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import attrs
import numpy as np
import torch

from speculators.bench.counts import Counts
from speculators.bench.rows import CHUNK_ENTRIES, JudgedResponse, log_probability
from speculators.bench.walk import walk
from speculators.drafter import Drafter, Replays
from speculators.events import Progress, ProgressEvent, ignore


@runtime_checkable
class CutsDrafts(Protocol):
    """A `Replays` whose drafter may draft fewer tokens than it is asked for."""

    @property
    def cuts(self) -> bool:
        """Whether it does, as it is configured; if not, all K follow from one pass."""

    def replay_lengths(
        self,
        *,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        num_speculative_tokens: int,
    ) -> torch.Tensor:
        """Returns [S] int64, how many tokens a live round drafts from each row; arguments as of `Replays.replay`."""


@attrs.frozen(eq=False, kw_only=True)
class Replayed:
    """Acceptance probabilities of a set of responses, from which every K up to K_max follows.

    Attributes:
        acceptance: a response each, [L, K_max] as in `walk`.
        lengths: a response each, [L] tokens that a live round drafts; None where that is always K.
        ids: the prompt of each response.
        categories: of each response.
        cut_prompts: responses that were cut because they left the verifier's own output.
        cut_tokens: tokens cut off.
    """

    acceptance: tuple[np.ndarray, ...]
    ids: tuple[str, ...]
    categories: tuple[str, ...]
    cut_prompts: int
    cut_tokens: int
    lengths: tuple[np.ndarray, ...] | None = None

    def counts(self, num_tokens: int) -> Counts:
        """Returns the expected counts at K = `num_tokens` (at most K_max).

        With `lengths`, or of drafts that depend on K, only K_max itself is exact; see `replay_each`.
        """
        return walk(self.acceptance, num_tokens, self.lengths)


@runtime_checkable
class ShapedByK(Protocol):
    """A `Replays` whose drafts may depend on how many are drafted a round."""

    @property
    def shaped_by_k(self) -> bool:
        """Whether they do, as it is configured; if not, all K follow from one pass."""


def replay(
    model: Replays,
    rows: Sequence[JudgedResponse],
    *,
    k_max: int,
    temperature: float,
    row_tokens: int = 2048,
    progress: Progress = ignore,
) -> Replayed:
    """Replays a speculator on responses.

    Args:
        model: the speculator, in evaluation mode.
        rows: judged at the same temperature.
        k_max: drafts a round, at most.
        row_tokens: responses are packed, separated, into rows of up to this many tokens; a longer one has its own.
    """
    tables: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    cuts = model if isinstance(model, CutsDrafts) and model.cuts else None
    for pack in map(_Pack.of, _packs(rows, row_tokens)):
        accepted = _replay_pack(model, pack, k_max=k_max, temperature=temperature)
        if cuts is not None:
            drafted = _lengths(cuts, pack, model.draft_to_target.device, k_max=k_max)
            accepted *= torch.arange(k_max) < drafted[:, None]
            lengths += [part.numpy() for part in drafted.split(pack.rounds)]
        tables += [table.numpy() for table in accepted.split(pack.rounds)]
        progress(ProgressEvent(stage="replay", done=len(tables), total=len(rows), unit="responses"))
    return _replayed(tables, rows, lengths if cuts is not None else None)


def one_pass(model: Replays) -> bool:
    """Whether all K follow from one pass: neither the drafts nor their number depend on K."""
    return not ((isinstance(model, CutsDrafts) and model.cuts) or (isinstance(model, ShapedByK) and model.shaped_by_k))


def replay_each(
    model: Replays,
    rows: Sequence[JudgedResponse],
    ks: Sequence[int],
    *,
    temperature: float,
    progress: Progress = ignore,
) -> dict[int, Replayed]:
    """Replays for several K: all from one pass, or a pass each where `one_pass` is not enough.

    Args:
        ks: the K.
    """
    if one_pass(model):
        return dict.fromkeys(ks, replay(model, rows, k_max=max(ks), temperature=temperature, progress=progress))
    return {k: replay(model, rows, k_max=k, temperature=temperature, progress=progress) for k in ks}


def replay_deterministic(make: Callable[[], Drafter], rows: Sequence[JudgedResponse], *, k_max: int) -> Replayed:
    """Replays a drafter that reads tokens only and proposes chains without probabilities; the verifier is not needed.

    Its q is a point mass on what it drafts, so min(1, q(y) / p(y)) is 1 if that is y, else 0, at every temperature.

    Args:
        make: builds the drafter, which sees the responses in their order.
    """
    drafter = make()
    nothing = torch.empty(0, 0)
    tables, lengths = [], []
    for row in rows:
        answer = torch.tensor(row.response.answer, dtype=torch.int64)
        table = np.zeros((max(0, len(answer) - 1), k_max), dtype=np.float32)
        drafted = np.zeros(len(table), dtype=np.int64)
        if len(table):
            state = drafter.begin(torch.tensor(row.response.tokens[: row.response.prompt_length + 1]), nothing)
        for anchor in range(len(table)):
            drafts = drafter.propose(state, num_tokens=k_max, temperature=0.0, generator=None).tokens
            drafted[anchor] = len(drafts)
            wanted = answer[anchor + 1 : anchor + 1 + len(drafts)]
            table[anchor, : len(wanted)] = (drafts[: len(wanted)] == wanted).numpy()
            drafter.advance(state, answer[anchor + 1 : anchor + 2], nothing)
        tables.append(table)
        lengths.append(drafted)
    return _replayed(tables, rows, lengths)


def _replayed(
    tables: Sequence[np.ndarray], rows: Sequence[JudgedResponse], lengths: Sequence[np.ndarray] | None
) -> Replayed:
    return Replayed(
        acceptance=tuple(tables),
        lengths=None if lengths is None else tuple(lengths),
        ids=tuple(row.response.id for row in rows),
        categories=tuple(row.response.category for row in rows),
        cut_prompts=sum(row.cut > 0 for row in rows),
        cut_tokens=sum(row.cut for row in rows),
    )


def _packs(rows: Sequence[JudgedResponse], row_tokens: int) -> Iterator[list[JudgedResponse]]:
    pack: list[JudgedResponse] = []
    size = 0
    for row in rows:
        length = len(row.response.tokens)
        if pack and size + length > row_tokens:
            yield pack
            pack, size = [], 0
        pack.append(row)
        size += length
    if pack:
        yield pack


@attrs.frozen(eq=False)
class _Pack:
    """Responses in one row. Places are indices in it.

    Attributes:
        anchors: a response each, the places of the states that its rounds draft from: one before the last known token.
        end: a response each, the place after its last token.
    """

    rows: Sequence[JudgedResponse]
    tokens: torch.Tensor
    log_p: torch.Tensor
    lengths: torch.Tensor
    anchors: tuple[torch.Tensor, ...]
    end: torch.Tensor

    @property
    def rounds(self) -> list[int]:
        """Rounds that could begin in each response."""
        return [len(places) for places in self.anchors]

    @classmethod
    def of(cls, rows: Sequence[JudgedResponse]) -> _Pack:
        lengths = torch.tensor([len(row.response.tokens) for row in rows])
        end = lengths.cumsum(0)
        tokens = torch.tensor([token for row in rows for token in row.response.tokens], dtype=torch.int64)
        log_p = torch.zeros(len(tokens))
        anchors = []
        for row, stop in zip(rows, end.tolist(), strict=True):
            if row.log_p is not None:
                log_p[stop - len(row.log_p) : stop] = row.log_p.cpu()
            rounds = max(0, len(row.response.answer) - 1)
            anchors.append(torch.arange(stop - 2 - rounds, stop - 2))
        return cls(rows, tokens, log_p, lengths, tuple(anchors), end)

    def batch(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns what `Replays.replay` takes."""
        positions = torch.cat([torch.arange(int(length)) for length in self.lengths])
        documents = torch.repeat_interleave(torch.arange(len(self.rows)), self.lengths)
        return {
            "hidden_states": torch.cat([row.hidden_states for row in self.rows]).to(device)[None],
            "input_ids": self.tokens.to(device)[None],
            "position_ids": positions.to(device)[None],
            "document_ids": documents.to(device)[None],
        }


@torch.no_grad()
def _replay_pack(model: Replays, pack: _Pack, *, k_max: int, temperature: float) -> torch.Tensor:
    """Returns [rounds of all responses, K] the probability that each depth is accepted."""
    device = model.draft_to_target.device
    place = torch.cat(pack.anchors)
    end = torch.repeat_interleave(pack.end, torch.tensor(pack.rounds))
    accepted = torch.zeros(len(place), k_max)
    depths = model.replay(**pack.batch(device), num_speculative_tokens=k_max)
    for depth, logits in enumerate(depths, start=1):
        there = (place + 1 + depth < end).nonzero()[:, 0]
        for part in there.split(max(1, CHUNK_ENTRIES // logits.shape[-1])):
            wanted = place[part] + 1 + depth
            accepted[part, depth - 1] = _accept(
                logits[place[part].to(device)],
                pack.tokens[wanted].to(device),
                pack.log_p[wanted].to(device),
                draft_to_target=model.draft_to_target,
                temperature=temperature,
            ).cpu()
    return accepted


@torch.no_grad()
def _lengths(model: CutsDrafts, pack: _Pack, device: torch.device, *, k_max: int) -> torch.Tensor:
    """Returns [rounds of all responses] the tokens that are drafted."""
    lengths = model.replay_lengths(**pack.batch(device), num_speculative_tokens=k_max)
    return lengths.cpu()[torch.cat(pack.anchors)]


def _accept(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    log_p: torch.Tensor,
    *,
    draft_to_target: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Returns [n] the probability that a draft from logits [n, D] was accepted, given that `tokens` were emitted."""
    if temperature == 0:
        return (draft_to_target[logits.argmax(dim=-1)] == tokens).float()
    size = 1 + int(torch.maximum(draft_to_target.max(), tokens.max()))
    target_to_draft = torch.full((size,), -1, device=tokens.device)
    target_to_draft[draft_to_target] = torch.arange(len(draft_to_target), device=tokens.device)
    index = target_to_draft[tokens]
    log_q = log_probability(logits.float() / temperature, index.clamp_min(0))
    # A token outside the draft vocabulary is never drafted.
    return torch.where(index >= 0, (log_q - log_p).clamp_max(0.0).exp(), 0.0)
