"""Acceptance and speed of a speculator as a running server has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from speculators.bench.statistics import bootstrap_ratio
from speculators.bench.suites import Prompt, prompts_digest
from speculators.data.template import ChatTemplate
from speculators.errors import ServerError
from speculators.events import Progress, ignore
from speculators.servers.counters import ENGINES, Counted, Engine, count, settled
from speculators.servers.endpoint import Endpoint
from speculators.servers.load import Asking, Pace, ask, pace, warm_up
from speculators.servers.result import ServedAcceptance, ServedSetting
from speculators.servers.streaming import Answer


@attrs.frozen(kw_only=True)
class Server:
    """A server and what it is.

    Attributes:
        model: as the server calls it.
        version: of the engine, as it says; "unknown" where it does not.
    """

    engine: Engine
    endpoint: Endpoint
    model: str
    version: str

    @classmethod
    def find(cls, engine: str, endpoint: Endpoint, model: str | None, *, option: str = "--model") -> Server:
        """Asks a server what it is.

        Args:
            model: None takes the only one that it offers.
            option: by which a user chooses it.

        Raises:
            ServerError: it cannot be asked, or offers several models, or another one.
        """
        offered = [str(each["id"]) for each in endpoint.get("/v1/models").get("data", [])]
        if (model is None and len(offered) != 1) or (model is not None and model not in offered):
            raise ServerError(f"{endpoint.url} offers the models {offered}", hint=f"{option} NAME chooses one")
        known = ENGINES[engine]
        return cls(engine=known, endpoint=endpoint, model=model or offered[0], version=_version(known, endpoint))

    def counted(self, *, speculates: bool) -> Counted:
        """Returns its counters once they stand still."""
        return settled(lambda: count(self.engine, self.endpoint.get_text("/metrics"), speculates=speculates))


@attrs.frozen(kw_only=True)
class Questions:
    """What is asked, and how.

    Attributes:
        suite: its name.
        prompts: of them, those that are asked.
        suite_digest: of all prompts of the suite.
        num_speculative_tokens: K, where the server does not tell it.
    """

    suite: str
    prompts: Sequence[Prompt]
    suite_digest: str
    template: ChatTemplate
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    seed: int
    concurrency: int
    num_speculative_tokens: int | None

    def asking(self, server: Server, temperature: float) -> Asking:
        """Returns how a server is asked."""
        return Asking(
            model=server.model,
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            stop_ids=self.stop_ids,
            seed=self.seed,
            concurrency=self.concurrency,
        )


def measure_served(
    server: Server, baseline: Server | None, questions: Questions, temperature: float, *, progress: Progress = ignore
) -> ServedSetting:
    """Puts a suite to a server, and to one that does not draft.

    Raises:
        ServerError: a server fails, does not tell what is needed, or is used by somebody else, too.
    """
    answers, counted, speed = _run(server, questions, temperature, speculates=True, progress=progress)
    plain = None
    if baseline is not None:
        _, told, plain = _run(baseline, questions, temperature, speculates=False, progress=progress)
        if told.rounds:
            raise ServerError(f"{baseline.endpoint.url} drafts: it is no baseline", hint="serve the verifier alone")
    k = _num_tokens(counted, questions.num_speculative_tokens)
    by_prompt = _by_prompt(answers, counted)
    acceptance = _acceptance(answers, counted, by_prompt, seed=questions.seed)
    speed_up = None if plain is None else speed.tokens_per_second / plain.tokens_per_second
    return ServedSetting(
        suite=questions.suite,
        prompts_digest=prompts_digest(questions.prompts),
        prompt_ids=tuple(prompt.id for prompt in questions.prompts),
        suite_digest=questions.suite_digest,
        num_speculative_tokens=k,
        temperature=temperature,
        definition=_definition(server, k, temperature),
        acceptance=acceptance,
        by_prompt=by_prompt,
        pace=speed,
        baseline=plain,
        speed_up=speed_up,
        unmatched_baseline=speed_up is not None and speed_up > acceptance.tau,
    )


def _run(
    server: Server, questions: Questions, temperature: float, *, speculates: bool, progress: Progress
) -> tuple[dict[str, list[Answer]], Counted, Pace]:
    """Returns a server's answers, what it counted meanwhile, and its pace."""
    asking = questions.asking(server, temperature)
    warm_up(server.endpoint, questions.template, questions.prompts[0], asking)
    before = server.counted(speculates=speculates)
    answers, seconds = ask(server.endpoint, questions.template, questions.prompts, asking, progress=progress)
    counted = server.counted(speculates=speculates).since(before)
    every = [answer for turns in answers.values() for answer in turns]
    told = pace(every, seconds)
    if counted.generated != told.tokens:
        words = f"{server.endpoint.url} counts {counted.generated:.0f} tokens, its answers have {told.tokens}"
        why = f"{told.repeated} answers broke off and were asked for again" if told.repeated else "others use it, too"
        raise ServerError(f"{words}: {why}, and its rounds are not those of this benchmark", hint="measure again")
    return answers, counted, told


def _acceptance(
    answers: Mapping[str, Sequence[Answer]],
    counted: Counted,
    by_prompt: Mapping[str, tuple[float, float]] | None,
    *,
    seed: int,
) -> ServedAcceptance:
    every = [answer for turns in answers.values() for answer in turns]
    tokens = float(sum(max(0, answer.tokens - 1) for answer in every))
    # A piece of an answer is one step or several, never less: steps without a draft are rounds, too.
    steps = float(sum(answer.steps for answer in every))
    rounds = max(counted.rounds, steps)
    if not counted.rounds:
        raise ServerError("the server drafted nothing", hint="was it started with the speculator?")
    interval = None
    if by_prompt is not None:
        sums = np.array(list(by_prompt.values()))
        interval = bootstrap_ratio(sums[:, 0], sums[:, 1], seed=seed)
    return ServedAcceptance(
        prompts=len(answers),
        responses=len(every),
        tokens=tokens,
        rounds=rounds,
        tau=tokens / rounds,
        tau_interval=interval,
        drafted=None if counted.drafted is None else counted.drafted / rounds,
        by_position=tuple(number / rounds for number in counted.by_position),
        undrafted=rounds - counted.rounds,
    )


def _by_prompt(answers: Mapping[str, Sequence[Answer]], counted: Counted) -> dict[str, tuple[float, float]] | None:
    """Returns tokens and rounds of each prompt, where the pieces of the answers add up to the rounds that it counts."""
    every = [answer for turns in answers.values() for answer in turns]
    if any(not answer.arrivals for answer in every):
        return None
    if sum(answer.steps for answer in every) != counted.rounds:
        return None
    return {
        name: (float(sum(max(0, answer.tokens - 1) for answer in turns)), float(sum(answer.steps for answer in turns)))
        for name, turns in answers.items()
    }


def _num_tokens(counted: Counted, told: int | None) -> int:
    found = len(counted.by_position) or told
    if found is None:
        raise ServerError("the server does not tell how many tokens it drafts a round", hint="--k K does")
    if told is not None and told != found:
        raise ServerError(f"the server drafts {found} tokens a round, --k says {told}")
    return found


def _definition(server: Server, k: int, temperature: float) -> str:
    return (
        "tau = tokens emitted a round, the verifier's own (bonus) token counted; the first token comes from the "
        f"prefill and belongs to no round; K={k}, T={temperature:g}; rounds: as {server.engine.name} {server.version} "
        f"counts them ({server.engine.rounds}_total), tokens: as in its answers; drafts: the server's own way"
    )


def _version(engine: Engine, endpoint: Endpoint) -> str:
    path, key = engine.version
    try:
        held: Any = endpoint.get(path)
    except ServerError:
        return "unknown"
    return str(held.get(key, "unknown")) if isinstance(held, dict) else "unknown"
