"""Exact acceptance length without decoding: one teacher-forced pass over responses that the verifier itself produced.

Let y be the response, p_j the verifier's distribution at a token and q_j the draft's at depth j of a round.

* An emitted token has distribution p_j whatever is drafted, because speculative sampling leaves the verifier's
  distribution untouched. Given that it is y_j, its draft was accepted with probability min(1, q_j(y_j) / p_j(y_j)); at
  T = 0 that is 1 if y_j is the draft's argmax, else 0. (A draft x is accepted as y with probability
  q(y) * min(1, p(y) / q(y)) = min(q(y), p(y)); dividing by p(y), the probability of emitting y, gives the formula.)
* If all earlier drafts of a round were accepted, they equal y. So the teacher-forced q_j, with y itself as the draft's
  input, is not an approximation: it is what a live round computes.

`walk` turns these probabilities into tokens, rounds and acceptance by position.

Source: Leviathan, Kalman and Matias 2023, Fast Inference from Transformers via Speculative Decoding (acceptance rule).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import attrs
import numpy as np
import torch

from speculators.bench.counts import Counts
from speculators.bench.packs import Pack, packs
from speculators.bench.rows import JudgedResponse, log_probability
from speculators.bench.walk import walk
from speculators.chunks import CHUNKS
from speculators.drafter import Drafter, Replays
from speculators.events import Progress, ProgressEvent, ignore


@runtime_checkable
class CutsDrafts(Protocol):
    """A `Replays` whose drafter may draft fewer than K tokens."""

    @property
    def cuts(self) -> bool:
        """Whether its present config cuts drafts; if not, one pass gives all K."""

    def replay_lengths(
        self,
        *,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        document_ids: torch.Tensor,
        num_speculative_tokens: int,
    ) -> torch.Tensor:
        """Counts the tokens that a live round drafts from each row, [S] int64; arguments as of `Replays.replay`."""


@attrs.frozen(eq=False, kw_only=True)
class Replayed:
    """Acceptance probabilities of a set of n responses, which determine the counts at every K up to K_max.

    Attributes:
        acceptance: for each response, [L, K_max] as in `walk`.
        ids: [n] the prompt of each response.
        prompt_lengths: [n] tokens before each response.
        categories: [n] the category of each response.
        cut_prompts: responses that were cut because they left the verifier's own output.
        cut_tokens: tokens cut off.
        lengths: for each response, [L] tokens that a live round drafts; None where that is always K.
        nodes: of a tree, tokens that each round drafts; the table says whether the tree has the token of each depth.
    """

    acceptance: tuple[np.ndarray, ...]
    ids: tuple[str, ...]
    prompt_lengths: tuple[int, ...]
    categories: tuple[str, ...]
    cut_prompts: int
    cut_tokens: int
    lengths: tuple[np.ndarray, ...] | None = None
    nodes: int | None = None

    def counts(self, num_tokens: int) -> Counts:
        """Computes the expected counts at K = `num_tokens`, at most K_max.

        With `lengths`, or where drafts depend on K, only K_max itself is exact; see `replay_each`.
        """
        counts = walk(self.acceptance, num_tokens, self.lengths)
        return counts if self.nodes is None else attrs.evolve(counts, drafted=self.nodes * counts.rounds)


@runtime_checkable
class ShapedByK(Protocol):
    """A `Replays` whose drafts may depend on how many are drafted per round."""

    @property
    def shaped_by_k(self) -> bool:
        """Whether they do with its present config; if not, one pass gives all K."""


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
        rows: responses judged at `temperature`.
        k_max: the largest K, drafts per round.
        temperature: of the verifier and of the drafts.
        row_tokens: responses are packed, as separate documents, into rows of up to this many tokens; a longer response
            has a row of its own.
        progress: receives progress events.
    """
    tables: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    # A drafter that may stop early accepts nothing past its stop, whatever the teacher-forced logits say there.
    cuts = model if isinstance(model, CutsDrafts) and model.cuts else None
    for pack in map(Pack.of, packs(rows, row_tokens)):
        accepted = _replay_pack(model, pack, k_max=k_max, temperature=temperature)
        if cuts is not None:
            drafted = _lengths(cuts, pack, model.draft_to_target.device, k_max=k_max)
            accepted *= torch.arange(k_max) < drafted[:, None]  # [rounds, K_max]
            lengths += [part.numpy() for part in torch.split(drafted, pack.rounds)]
        tables += [table.numpy() for table in torch.split(accepted, pack.rounds)]
        progress(ProgressEvent(stage="replay", done=len(tables), total=len(rows), unit="responses"))
    return _replayed(tables, rows, lengths if cuts is not None else None)


def one_pass(model: Replays) -> bool:
    """Whether one pass gives all K, because neither the drafts nor their number depend on K."""
    return not ((isinstance(model, CutsDrafts) and model.cuts) or (isinstance(model, ShapedByK) and model.shaped_by_k))


def replay_each(
    model: Replays,
    rows: Sequence[JudgedResponse],
    ks: Sequence[int],
    *,
    temperature: float,
    progress: Progress = ignore,
) -> dict[int, Replayed]:
    """Replays for several K: in one pass where that gives all of them, else in one pass for each.

    Returns:
        The replay of each K; the same object where one pass was enough.
    """
    if one_pass(model):
        return dict.fromkeys(ks, replay(model, rows, k_max=max(ks), temperature=temperature, progress=progress))
    return {k: replay(model, rows, k_max=k, temperature=temperature, progress=progress) for k in ks}


def replay_deterministic(make: Callable[[], Drafter], rows: Sequence[JudgedResponse], *, k_max: int) -> Replayed:
    """Replays a drafter that reads tokens only and proposes chains without probabilities; no model is needed.

    Its q is a point mass on its draft, so min(1, q(y) / p(y)) is 1 if that is y, else 0, at every temperature.

    Args:
        make: makes the drafter, which sees the responses in their order and may remember them.
        rows: the verifier's own responses.
        k_max: K.
    """
    drafter = make()
    nothing = torch.empty(0, 0)
    tables, lengths = [], []
    for row in rows:
        answer = torch.tensor(row.response.answer, dtype=torch.int64)
        table = np.zeros((max(0, len(answer) - 1), k_max), dtype=np.float32)
        drafted = np.zeros(len(table), dtype=np.int64)
        if len(answer):
            state = drafter.begin(torch.tensor(row.response.tokens[: row.response.prompt_length + 1]), nothing)
        for anchor in range(len(table)):
            drafts = drafter.propose(state, num_tokens=k_max, temperature=0.0, generator=None).tokens
            drafted[anchor] = len(drafts)
            emitted = answer[anchor + 1 : anchor + 1 + len(drafts)]
            table[anchor, : len(emitted)] = (drafts[: len(emitted)] == emitted).numpy()
            drafter.advance(state, answer[anchor + 1 : anchor + 2], nothing)
        tables.append(table)
        lengths.append(drafted)
    return _replayed(tables, rows, lengths)


def or_speculator(matched: Replayed, speculator: Replayed) -> Replayed:
    """Combines the replays of a look-up and of the speculator that drafts wherever the look-up proposes nothing.

    Which of the two proposes at an anchor follows from the verifier's tokens up to there, so replay knows it, and the
    acceptance of each depth is that of whichever proposes.

    Args:
        matched: at K, with `lengths`.
        speculator: on the same responses, at K or more.
    """
    assert matched.lengths is not None, "a look-up counts what it proposes"
    tables, lengths = [], []
    for row, (table, drafted) in enumerate(zip(matched.acceptance, matched.lengths, strict=True)):
        num_tokens = table.shape[1]
        proposes = drafted > 0
        tables.append(np.where(proposes[:, None], table, speculator.acceptance[row][:, :num_tokens]))
        otherwise = num_tokens if speculator.lengths is None else speculator.lengths[row]
        lengths.append(np.where(proposes, drafted, otherwise))
    return attrs.evolve(matched, acceptance=tuple(tables), lengths=tuple(lengths))


def _replayed(
    tables: Sequence[np.ndarray], rows: Sequence[JudgedResponse], lengths: Sequence[np.ndarray] | None
) -> Replayed:
    return Replayed(
        acceptance=tuple(tables),
        lengths=None if lengths is None else tuple(lengths),
        ids=tuple(row.response.id for row in rows),
        prompt_lengths=tuple(row.response.prompt_length for row in rows),
        categories=tuple(row.response.category for row in rows),
        cut_prompts=sum(row.cut > 0 for row in rows),
        cut_tokens=sum(row.cut for row in rows),
    )


@torch.no_grad()
def _replay_pack(model: Replays, pack: Pack, *, k_max: int, temperature: float) -> torch.Tensor:
    """Computes the probability that each depth is accepted, [rounds of all responses, K]."""
    device = model.draft_to_target.device
    place = torch.cat(pack.anchors)
    end = torch.repeat_interleave(pack.end, torch.tensor(pack.rounds))
    accepted = torch.zeros(len(place), k_max)  # 0 where the response has ended: nothing can be accepted there
    depths = model.replay(**pack.batch(device), num_speculative_tokens=k_max)  # K times [S, D]
    for depth, logits in enumerate(depths, start=1):
        # The draft at depth j is judged by the token j + 1 places behind the state, if the response has one there.
        judged = (place + 1 + depth < end).nonzero()[:, 0]
        for part in torch.split(judged, max(1, CHUNKS[device.type].judged_elements // logits.shape[-1])):
            target = place[part] + 1 + depth
            accepted[part, depth - 1] = _accept(
                logits[place[part].to(device)],
                pack.tokens[target].to(device),
                pack.log_p[target].to(device),
                draft_to_target=model.draft_to_target,
                temperature=temperature,
            ).cpu()
    return accepted


@torch.no_grad()
def _lengths(model: CutsDrafts, pack: Pack, device: torch.device, *, k_max: int) -> torch.Tensor:
    """Counts the tokens that are drafted from each anchor, [rounds of all responses]."""
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
    """Computes the probability [n] that a draft was accepted, given the token that was emitted.

    Args:
        logits: [n, D] of the draft.
        tokens: [n] emitted.
        log_p: [n] log-probability that the verifier gives them.
        draft_to_target: [D] token of the target vocabulary for each of the draft vocabulary.
        temperature: of both.
    """
    if temperature == 0:
        return (draft_to_target[logits.argmax(dim=-1)] == tokens).float()
    # The inverse map; -1 is a token outside of the draft vocabulary, which is never drafted: its q is 0.
    size = 1 + int(torch.maximum(draft_to_target.max(), tokens.max()))
    target_to_draft = torch.full((size,), -1, device=tokens.device)
    target_to_draft[draft_to_target] = torch.arange(len(draft_to_target), device=tokens.device)
    index = target_to_draft[tokens]
    # Ratios in log space: p and q are tiny for rare tokens, and exp comes last.
    log_q = log_probability(logits.float() / temperature, index.clamp_min(0))
    return torch.where(index >= 0, (log_q - log_p).clamp_max(0.0).exp(), 0.0)
