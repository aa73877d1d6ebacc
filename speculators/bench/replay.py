"""Exact acceptance length without decoding: one teacher-forced pass over responses that the verifier itself produced.

Let y be the response, p_j the verifier's distribution at a token and q_j the draft's at depth j of a round.

* An emitted token has distribution p_j whatever is drafted, because speculative sampling leaves the verifier's
  distribution untouched. Given that it is y_j, its draft was accepted with probability min(1, q_j(y_j) / p_j(y_j)); at
  T = 0 that is 1 if y_j is the draft's argmax, else 0. (A draft x is accepted as y with probability
  q(y) * min(1, p(y) / q(y)) = min(q(y), p(y)); dividing by p(y), the probability of emitting y, gives the formula.)
* If all earlier drafts of a round were accepted, they equal y. So the teacher-forced q_j, with y itself as the draft's
  input, is not an approximation: it is what a live round computes.
* Block verification judges drafts together, and what it accepted follows from the same ratios: given that y was
  emitted, the first j drafts were accepted with probability min over i <= j of prod_{l <= i} q_l(y_l) / p_l(y_l), the
  empty product included. (With r as in `verify_block`, a round drafts y_1..y_j, accepts exactly these and emits y_{j+1}
  with probability prod_{l <= j} q_l(y_l) * max(r_j p_{j+1}(y_{j+1}) - q_{j+1}(y_{j+1}), 0). Divided by the probability
  of emitting y_1..y_{j+1} that is M_j - M_{j+1}, with M_j = r_j prod_{l <= j} q_l(y_l) / p_l(y_l), which is that
  minimum.) It is never less than the product of min(1, q_l(y_l) / p_l(y_l)), which the rule above gives.

`walk` turns these probabilities into tokens, rounds and acceptance by position.

Source: Leviathan, Kalman and Matias 2023, Fast Inference from Transformers via Speculative Decoding (acceptance rule);
Sun et al. 2403.10444 (block verification).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import attrs
import numpy as np
import torch

from speculators.bench.counts import Counts
from speculators.bench.margins import Margins, margins
from speculators.bench.packs import Pack, packs
from speculators.bench.rows import JudgedResponse, log_probability
from speculators.bench.walk import walk
from speculators.chunks import CHUNKS
from speculators.drafter import Drafter, Replays
from speculators.events import Progress, ProgressEvent, ignore

# (draft logits [n, D], emitted tokens [n], log-probability that the verifier gives them [n]) -> what is kept, [n, F].
Judge = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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
    block_verification: bool = False,
    row_tokens: int = 2048,
    progress: Progress = ignore,
) -> Replayed:
    """Replays a speculator on responses.

    Args:
        model: the speculator, in evaluation mode.
        rows: responses judged at `temperature`.
        k_max: the largest K, drafts per round.
        temperature: of the verifier and of the drafts.
        block_verification: judges a round's drafts as a block instead of token by token; at T = 0 that is the same.
        row_tokens: responses are packed, as separate documents, into rows of up to this many tokens; a longer response
            has a row of its own.
        progress: receives progress events.
    """
    tables: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    # A drafter that may stop early accepts nothing past its stop, whatever the teacher-forced logits say there.
    cuts = _cutting(model)
    judge = partial(_log_ratio, draft_to_target=model.draft_to_target, temperature=temperature)
    for pack in map(Pack.of, packs(rows, row_tokens)):
        # q = 0 where the response has ended: nothing can be accepted there.
        ratios = _replay_pack(model, pack, judge, k_max=k_max, unjudged=(-torch.inf,))[..., 0]
        accepted = _acceptance(ratios, block_verification=block_verification)
        if cuts is not None:
            drafted = _lengths(cuts, pack, model.draft_to_target.device, k_max=k_max)
            accepted *= torch.arange(k_max) < drafted[:, None]  # [rounds, K_max]
            lengths += [part.numpy() for part in torch.split(drafted, pack.rounds)]
        tables += [table.numpy() for table in torch.split(accepted, pack.rounds)]
        progress(ProgressEvent(stage="replay", done=len(tables), total=len(rows), unit="responses"))
    return _replayed(tables, rows, lengths if cuts is not None else None)


def replay_margins(
    model: Replays, rows: Sequence[JudgedResponse], *, k_max: int, row_tokens: int = 2048
) -> list[Margins]:
    """Replays a speculator at T = 0 and computes the draft's margin of each emitted token.

    Args:
        model, row_tokens: as in `replay`.
        rows: responses, whoever produced them: drafts at T = 0 follow from the tokens alone.
        k_max: K.

    Returns:
        For each response [L, K]; entry [i, j - 1] is of the token that depth j of a round at anchor i drafts. -inf past
        the end, outside of the draft vocabulary, and where the drafter has stopped.
    """
    tables: list[Margins] = []
    cuts = _cutting(model)
    for pack in map(Pack.of, packs(rows, row_tokens)):

        def judge(logits: torch.Tensor, tokens: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return margins(logits, _draft_ids(model.draft_to_target, tokens))

        both = _replay_pack(model, pack, judge, k_max=k_max, unjudged=(-torch.inf, 0.0))
        if cuts is not None:
            drafted = _lengths(cuts, pack, model.draft_to_target.device, k_max=k_max)
            both[..., 0].masked_fill_(torch.arange(k_max) >= drafted[:, None], -torch.inf)
        tables += [Margins(*part.numpy().transpose(2, 0, 1)) for part in torch.split(both, pack.rounds)]
    return tables


def _cutting(model: Replays) -> CutsDrafts | None:
    return model if isinstance(model, CutsDrafts) and model.cuts else None


def one_pass(model: Replays) -> bool:
    """Whether one pass gives all K, because neither the drafts nor their number depend on K."""
    return _cutting(model) is None and not (isinstance(model, ShapedByK) and model.shaped_by_k)


def replay_each(
    model: Replays,
    rows: Sequence[JudgedResponse],
    ks: Sequence[int],
    *,
    temperature: float,
    block_verification: bool = False,
    progress: Progress = ignore,
) -> dict[int, Replayed]:
    """Replays for several K: in one pass where that gives all of them, else in one pass for each.

    Returns:
        The replay of each K; the same object where one pass was enough.
    """
    replay_at = partial(
        replay, model, rows, temperature=temperature, block_verification=block_verification, progress=progress
    )
    return dict.fromkeys(ks, replay_at(k_max=max(ks))) if one_pass(model) else {k: replay_at(k_max=k) for k in ks}


def replay_deterministic(make: Callable[[], Drafter], rows: Sequence[JudgedResponse], *, k_max: int) -> Replayed:
    """Replays a drafter that reads tokens only and proposes chains without probabilities; no model is needed.

    Its q is a point mass on its draft, so q(y) / p(y) is at least 1 if that is y, else 0: what was accepted follows
    from the tokens, at every temperature, and by either rule of verification.

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
def _replay_pack(model: Replays, pack: Pack, judge: Judge, *, k_max: int, unjudged: tuple[float, ...]) -> torch.Tensor:
    """Judges each depth, [rounds of all responses, K, F].

    Args:
        unjudged: the F values of depths past the end of their response.
    """
    device = model.draft_to_target.device
    place = torch.cat(pack.anchors)
    end = torch.repeat_interleave(pack.end, torch.tensor(pack.rounds))
    table = torch.tensor(unjudged).repeat(len(place), k_max, 1)
    depths = model.replay(**pack.batch(device), num_speculative_tokens=k_max)  # K times [S, D]
    for depth, logits in enumerate(depths, start=1):
        # The draft at depth j is judged by the token j + 1 places behind the state, if the response has one there.
        judged = (place + 1 + depth < end).nonzero()[:, 0]
        if not len(judged):
            continue
        for part in torch.split(judged, max(1, CHUNKS[device.type].judged_elements // logits.shape[-1])):
            target = place[part] + 1 + depth
            table[part, depth - 1] = judge(
                logits[place[part].to(device)], pack.tokens[target].to(device), pack.log_p[target].to(device)
            ).cpu()
    return table


def _acceptance(ratios: torch.Tensor, *, block_verification: bool) -> torch.Tensor:
    """Computes the probability that each depth is accepted, given that all before it were, from log q / p, [n, K]."""
    if not block_verification:
        return ratios.clamp_max(0.0).exp()
    # The logarithm of the probability that the first j drafts are accepted: see the top of this file.
    together = ratios.cumsum(dim=-1).clamp_max(0.0).cummin(dim=-1).values
    before = torch.nn.functional.pad(together[:, :-1], (1, 0))
    return torch.where(together.isneginf(), 0.0, (together - before).exp())


@torch.no_grad()
def _lengths(model: CutsDrafts, pack: Pack, device: torch.device, *, k_max: int) -> torch.Tensor:
    """Counts the tokens that are drafted from each anchor, [rounds of all responses]."""
    lengths = model.replay_lengths(**pack.batch(device), num_speculative_tokens=k_max)
    return lengths.cpu()[torch.cat(pack.anchors)]


def _log_ratio(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    log_p: torch.Tensor,
    *,
    draft_to_target: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Computes log q(y) - log p(y) of emitted tokens y, [n, 1]; at T = 0 either 0 or, if y is not drafted, -inf.

    Args:
        logits: [n, D] of the draft.
        tokens: [n] emitted.
        log_p: [n] log-probability that the verifier gives them.
        draft_to_target: [D] token of the target vocabulary for each of the draft vocabulary.
        temperature: of both.
    """
    if temperature == 0:
        return (draft_to_target[logits.argmax(dim=-1)] == tokens).float().log()[:, None]
    index = _draft_ids(draft_to_target, tokens)
    # In log space, for p and q are tiny for rare tokens.
    log_q = log_probability(logits.float() / temperature, index.clamp_min(0))
    return torch.where(index >= 0, log_q - log_p, -torch.inf)[:, None]


def _draft_ids(draft_to_target: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Finds the draft ids [n] of tokens [n]; -1 for a token outside of the draft vocabulary, which is never drafted."""
    size = 1 + int(torch.maximum(draft_to_target.max(), tokens.max()))
    target_to_draft = torch.full((size,), -1, device=tokens.device)
    target_to_draft[draft_to_target] = torch.arange(len(draft_to_target), device=tokens.device)
    return target_to_draft[tokens]
