"""The rounds of a server's answers: how many drafts each accepted, as the server reports it or as its chunks show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import attrs

from speculators.bench.rows import Response
from speculators.errors import ServerError
from speculators.events import Progress, ignore
from speculators.servers.benchmark import Server, known_num_speculative_tokens
from speculators.servers.load import Workload, run_workload, warm_up
from speculators.servers.streaming import Completion

DETAILED = "start vllm serve with --per-request-spec-decode-metrics detailed (0.32 or later)"


@attrs.frozen(kw_only=True)
class ServedAnswer:
    """One answer of a server and its rounds.

    Attributes:
        suite: name of the prompt's suite.
        response: the tokens that were sent and returned.
        turn: of its prompt, from 0.
        has_system: whether its prompt has a system turn.
        rounds: (anchor, accepted) of each round: index in the answer of the last token that was known when it began,
            and accepted drafts up to the end of the answer.
        open_end: whether it is unknown if the last token of the last round was drafted.
    """

    suite: str
    response: Response
    turn: int
    has_system: bool
    rounds: tuple[tuple[int, int], ...]
    open_end: bool = False


@attrs.frozen(kw_only=True)
class ServedAnswers:
    """A server's answers to a suite.

    Attributes:
        answers: to all turns of all prompts, in their order.
        num_speculative_tokens: K.
        source: how the rounds are known.
    """

    answers: tuple[ServedAnswer, ...]
    num_speculative_tokens: int
    source: str


def served_answers(
    server: Server, workload: Workload, *, num_speculative_tokens: int | None = None, progress: Progress = ignore
) -> ServedAnswers:
    """Has a server answer a suite, and finds out the rounds of each answer.

    Args:
        server: serves the speculator.
        workload: the prompts, at T = 0.
        num_speculative_tokens: K, for an engine that does not report it.
        progress: receives the number of answered prompts.

    Raises:
        ServerError: the server fails, does not list token ids, or leaves its rounds unknown.
    """
    reported = warm_up(server.endpoint, workload, model=server.model).rounds
    if reported is not None:
        answers, _ = run_workload(server.endpoint, workload, model=server.model, progress=progress)
        source = "metrics.speculative_decoding of each answer"
        k = reported.num_speculative_tokens
        if num_speculative_tokens not in (None, k):
            raise ServerError(f"the server drafts {k} tokens per round, but --k is {num_speculative_tokens}")
    else:
        before = server.counters(speculates=True)
        answers, _ = run_workload(server.endpoint, workload, model=server.model, progress=progress)
        counted = server.counters(speculates=True).since(before)
        chunks = sum(answer.steps for turns in answers.values() for answer in turns)
        # A server may join the tokens of two rounds into one chunk, or send one round in two.
        if chunks != counted.rounds:
            message = f"{server.endpoint.url} reports no rounds, and sent {chunks} chunks for {counted.rounds:.0f}"
            raise ServerError(f"{message}: which of them accepted what is unknown", hint=DETAILED)
        k = known_num_speculative_tokens(counted, num_speculative_tokens)
        source = "chunks of each answer, as many as the server counts rounds, without the last"
    return ServedAnswers(answers=tuple(_answers(server, workload, answers)), num_speculative_tokens=k, source=source)


def place_rounds(accepted: Sequence[int], num_tokens: int) -> list[tuple[int, int]] | None:
    """Finds (anchor, accepted up to the end of the answer) of each round.

    Args:
        accepted: drafts of each round, in order.
        num_tokens: of the answer, the first of which belongs to no round.

    Returns:
        None if the rounds do not add up to the answer.
    """
    rounds, anchor, left = [], 0, max(0, num_tokens - 1)
    for count in accepted:
        if anchor >= left:
            return None
        rounds.append((anchor, min(count, left - anchor)))
        anchor += count + 1
    return rounds if anchor >= left else None


def _answers(server: Server, workload: Workload, answers: dict[str, list[Completion]]) -> list[ServedAnswer]:
    served = []
    for prompt in workload.prompts:
        for turn, answer in enumerate(answers[prompt.id]):
            response = Response(
                id=prompt.id,
                category=prompt.category,
                tokens=(*answer.prompt, *answer.ids),
                prompt_length=len(answer.prompt),
            )
            served.append(
                ServedAnswer(
                    suite=workload.suite,
                    response=response,
                    turn=turn,
                    has_system=any(message.role in ("system", "developer") for message in prompt.messages),
                    rounds=tuple(_rounds(server, prompt.id, answer)),
                    # A chunk of n tokens is n - 1 drafts and the verifier's token, but for what the end cuts off.
                    open_end=answer.rounds is None,
                )
            )
    return served


def _rounds(server: Server, prompt: str, answer: Completion) -> list[tuple[int, int]]:
    where = f"{server.endpoint.url}: answer to prompt {prompt}"
    if len(answer.ids) != answer.tokens:
        message = f"{where}: lists the ids of {len(answer.ids)} of its {answer.tokens} tokens"
        raise ServerError(message, hint="an audit replays the server's own tokens: all must be listed")
    if answer.rounds is not None:
        accepted = list(answer.rounds.accepted)
    else:
        counts = [count for _, count in answer.arrivals]
        accepted = [after - before - 1 for before, after in pairwise(counts)]
    rounds = place_rounds(accepted, answer.tokens)
    if rounds is None:
        made = f"{len(accepted)} rounds with {sum(accepted)} accepted drafts"
        message = f"{where}: {made} do not make {answer.tokens} tokens"
        hint = "it decoded some tokens without a draft: use a server without a table of K by batch size"
        raise ServerError(message, hint=hint)
    return rounds
