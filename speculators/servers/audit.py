"""Compares each round of a server at T = 0 with replay's prediction for the very tokens that the server emitted.

Given the tokens, the drafts at T = 0 follow: a round at anchor i accepts as many drafts as replay finds equal to the
tokens behind i. Whether the tokens themselves are the verifier's is another question, and answered apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import numpy as np
import torch

from speculators.bench.margins import Margins
from speculators.bench.result import jsonable
from speculators.bench.walk import greedy_rounds
from speculators.servers.rounds import ServedAnswer
from speculators.structure.faults import FloatOrNaN

AGREES, NEAR_TIE, DIFFERS = "agrees", "near tie", "differs"


@attrs.frozen(kw_only=True)
class AuditedRound:
    """One round of a server beside its prediction.

    Attributes:
        suite: of the prompt, whose id is `prompt`.
        turn: of the prompt, from 0.
        has_system: whether the prompt has a system turn.
        number: of the round in its answer, from 0.
        anchor: index in the answer of the last token that was known when it began.
        position: tokens of prompt and answer that were known, that one included.
        predicted: accepted drafts by replay.
        served: accepted drafts by the server.
        verdict: AGREES; NEAR_TIE, where rounding explains the difference; or DIFFERS.
        depth: of the first draft that the server cannot have drafted by rounding alone; the first that differs in a
            near tie; 0 where the round agrees.
        draft_gap: by how much the draft's logits there prefer the token that they choose to what was served: to the
            emitted token if the server accepted it, else to the next best; None where no gap would do (the emitted
            token is outside of the draft vocabulary), and where the round agrees.
        verifier_gap: by how much the verifier prefers the emitted token there to the next best; below 0 if it prefers
            another.
    """

    suite: str
    prompt: str
    turn: int
    has_system: bool
    number: int
    anchor: int
    position: int
    predicted: int
    served: int
    verdict: str
    depth: int = 0
    draft_gap: float | None = None
    verifier_gap: float | None = None


@attrs.frozen(kw_only=True)
class Pattern:
    """Something that the differing rounds have in common.

    Attributes:
        what: the pattern, with its counts.
        check: what to look at.
    """

    what: str
    check: str


@attrs.frozen(kw_only=True)
class Explanation:
    """A speculator other than the run's that the server may have loaded, tried by replay.

    Attributes:
        what: the difference.
        todo: the remedy if it explains the server.
        agreeing: rounds that it predicts, near ties included.
        explains: whether it leaves so few of the differing rounds that it is the finding.
    """

    what: str
    todo: str
    agreeing: int
    explains: bool


@attrs.frozen(eq=False, kw_only=True)
class Prediction:
    """What replay says of one answer.

    Attributes:
        draft: margins of the drafts, [L, >= K] as by `replay_margins`.
        verifier: margins of the answer's tokens, [L + 1].
        dtype: whose rounding decides what is a near tie.
    """

    draft: Margins
    verifier: Margins
    dtype: torch.dtype


@attrs.frozen(kw_only=True)
class Tally:
    """Counts of an audit.

    Attributes:
        answers: of the server.
        tokens: of all answers.
        foreign_tokens: tokens that are not the verifier's choice, beyond near ties: the server verifies with another
            model.
        tied_tokens: tokens that are not the verifier's choice, by a near tie.
        rounds: compared; the last of an answer is not, where its chunk does not tell its drafts.
        agreeing: rounds that are exactly as predicted.
        near_ties: rounds that are so but for rounding.
        predicted_tau: acceptance length by replay over the server's tokens.
        served_tau: acceptance length of the server.
    """

    answers: int
    tokens: int
    foreign_tokens: int
    tied_tokens: int
    rounds: int
    agreeing: int
    near_ties: int
    predicted_tau: FloatOrNaN
    served_tau: FloatOrNaN

    @classmethod
    def of(
        cls,
        answers: Sequence[ServedAnswer],
        predictions: Sequence[Prediction],
        rounds: Sequence[AuditedRound],
        num_tokens: int,
    ) -> Tally:
        """Counts what `audit_rounds` compared.

        Args:
            answers, predictions, num_tokens: as of `audit_rounds`.
            rounds: its result.
        """
        foreign, tied = foreign_tokens(predictions)
        lengths = [len(answer.response.answer) for answer in answers]
        emitted = sum(max(0, length - 1) for length in lengths)
        return cls(
            answers=len(answers),
            tokens=sum(lengths),
            foreign_tokens=foreign,
            tied_tokens=tied,
            rounds=len(rounds),
            agreeing=sum(each.verdict == AGREES for each in rounds),
            near_ties=sum(each.verdict == NEAR_TIE for each in rounds),
            predicted_tau=_ratio(emitted, predicted_rounds(predictions, num_tokens)),
            served_tau=_ratio(emitted, sum(len(answer.rounds) for answer in answers)),
        )


@attrs.frozen(kw_only=True)
class AuditResult:
    """One audit of a server.

    Attributes:
        speculator: the run whose speculator predicts, or a folder.
        dtype: in which it predicts.
        near_tie: gaps up to this are rounding.
        source: how the server's rounds are known.
        tally: of its answers, tokens and rounds.
        differing: rounds that rounding does not explain, in the order of the prompts.
        patterns: what they have in common.
        explanations: other speculators that were tried, the best first; () where the audit passes.
    """

    speculator: str
    verifier: str
    engine: str
    version: str
    model: str
    endpoint: str
    suites: tuple[str, ...]
    prompts_digests: tuple[str, ...]
    num_speculative_tokens: int
    max_new_tokens: int
    concurrency: int
    dtype: str
    near_tie: str
    source: str
    tally: Tally
    differing: tuple[AuditedRound, ...]
    patterns: tuple[Pattern, ...]
    explanations: tuple[Explanation, ...]
    format: int = 1

    @property
    def passes(self) -> bool:
        """Whether every round and every token is as predicted, but for near ties."""
        return self.tally.rounds > 0 and not self.differing and not self.tally.foreign_tokens

    def to_json(self) -> dict[str, Any]:
        """Converts to JSON values, NaN to null."""
        document: dict[str, Any] = jsonable(attrs.asdict(self))
        return {**document, "passes": self.passes}


def audit_rounds(
    answers: Sequence[ServedAnswer], predictions: Sequence[Prediction], num_tokens: int
) -> list[AuditedRound]:
    """Compares each round of each answer with its prediction.

    Args:
        answers: of the server.
        predictions: one for each answer.
        num_tokens: K.
    """
    return [
        _audited(answer, prediction, number, num_tokens)
        for answer, prediction in zip(answers, predictions, strict=True)
        for number in range(len(answer.rounds) - answer.open_end)
    ]


def predicted_rounds(predictions: Sequence[Prediction], num_tokens: int) -> int:
    """Counts the rounds of replay's own walk along the same answers."""
    tables = [(prediction.draft.values >= 0).astype(np.float64) for prediction in predictions]
    return sum(len(greedy_rounds(table, num_tokens)) for table in tables)


def foreign_tokens(predictions: Sequence[Prediction]) -> tuple[int, int]:
    """Counts answer tokens that the verifier would not choose: beyond rounding, and by a near tie."""
    foreign, tied = 0, 0
    for prediction in predictions:
        margins, rounding = prediction.verifier.values, prediction.verifier.rounding(prediction.dtype)
        foreign += int((margins < -rounding).sum())
        tied += int(((margins < 0) & (margins >= -rounding)).sum())
    return foreign, tied


def _ratio(tokens: int, rounds: int) -> float:
    return tokens / rounds if rounds else float("nan")


def _audited(answer: ServedAnswer, prediction: Prediction, number: int, num_tokens: int) -> AuditedRound:
    anchor, served = answer.rounds[number]
    left = len(answer.response.answer) - 1 - anchor
    limit = min(num_tokens, left)
    margins = prediction.draft.values[anchor, :limit]
    rounding = prediction.draft.rounding(prediction.dtype)[anchor, :limit]
    predicted = int((margins >= 0).cumprod().sum())
    verdict, depth = _verdict(margins, rounding, predicted, served)
    judged = AuditedRound(
        suite=answer.suite,
        prompt=answer.response.id,
        turn=answer.turn,
        has_system=answer.has_system,
        number=number,
        anchor=anchor,
        position=answer.response.prompt_length + anchor + 1,
        predicted=predicted,
        served=served,
        verdict=verdict,
    )
    if not depth:
        return judged
    gap = abs(float(margins[depth - 1]))
    return attrs.evolve(
        judged,
        depth=depth,
        draft_gap=gap if np.isfinite(gap) else None,
        verifier_gap=float(prediction.verifier.values[anchor + depth]),
    )


def _verdict(margins: np.ndarray, rounding: np.ndarray, predicted: int, served: int) -> tuple[str, int]:
    """Judges a round, and finds the depth at which it leaves the prediction, 0 if it does not.

    Rounding explains a round if every draft that the server accepted is chosen or nearly so, and the one that it
    rejected is not chosen, or hardly.
    """
    if served == predicted:
        return AGREES, 0
    for depth in _contradictions(margins, rounding, served):
        return DIFFERS, depth
    return NEAR_TIE, min(predicted, served) + 1


def _contradictions(margins: np.ndarray, rounding: np.ndarray, served: int) -> Iterator[int]:
    yield from (int(place) + 1 for place in np.flatnonzero(margins[:served] < -rounding[:served]))
    if served < len(margins) and margins[served] > rounding[served]:
        yield served + 1
