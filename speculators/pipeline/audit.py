"""Audits a running server: every round beside replay's prediction, and other speculators that would explain it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.bench.margins import Margins, describe_rounding, verifier_margins
from speculators.bench.replay import replay_margins
from speculators.bench.rows import JudgedResponse
from speculators.bench.suites import prompts_digest
from speculators.cpu import sharing_the_cpu
from speculators.drafter import Replays
from speculators.events import Progress, ProgressEvent
from speculators.model import SpeculatorModel
from speculators.nn.precision import place
from speculators.pipeline.measure import SavedSpeculator, find_server, load_saved, suite_workloads
from speculators.recipe.schema import BenchmarkSection
from speculators.servers.audit import (
    DIFFERS,
    AuditedRound,
    AuditResult,
    Explanation,
    Prediction,
    Tally,
    audit_rounds,
)
from speculators.servers.endpoint import Endpoint
from speculators.servers.patterns import find_patterns
from speculators.servers.rounds import ServedAnswer, served_answers
from speculators.verifier.engine import Engine
from speculators.verifier.weights import load_head

# Share of the differing rounds that may be left to what explains them: a wrong draft is right by accident now and then.
LEFT = 0.1
# Rotary thetas that programs assume or models have, and what a wrong number of zeros makes of a theta.
THETAS = (10_000.0, 500_000.0, 1_000_000.0)
ZEROS = (0.01, 0.1, 10.0, 100.0)


@sharing_the_cpu()
def audit_endpoint(
    subject: SavedSpeculator,
    section: BenchmarkSection,
    *,
    engine: str,
    endpoint: Endpoint,
    model: str | None = None,
    concurrency: int = 1,
    num_speculative_tokens: int | None = None,
    server_dtype: str | None = None,
    take: int | None = None,
    progress: Progress,
) -> AuditResult:
    """Compares a server's rounds at T = 0 with replay's predictions for the tokens that it emitted.

    Args:
        engine, endpoint, model, concurrency, num_speculative_tokens, take: as of `measure_endpoint`.
        server_dtype: in which the server computes, which decides what is rounding; None for the verifier's own.

    Raises:
        SpeculatorsError: speculator or verifier cannot be loaded, or the server fails or hides its rounds.
    """
    server = find_server(engine, endpoint, model)
    workloads = suite_workloads(subject, section, concurrency=concurrency, take=take, progress=progress)
    parts = [
        served_answers(server, workload, num_speculative_tokens=num_speculative_tokens, progress=progress)
        for workload in workloads
    ]
    k = parts[0].num_speculative_tokens
    answers = [answer for part in parts for answer in part.answers]
    speculator, verifier = load_saved(subject, ks=(k,), progress=progress)
    rounding = verifier.dtype if server_dtype is None else getattr(torch, server_dtype)
    trials = _Trials(answers=answers, verifier=verifier, num_tokens=k, rounding=rounding, progress=progress)
    rounds, predictions = trials.run(speculator, speculator.draft().target_layer_ids)
    differing = tuple(each for each in rounds if each.verdict == DIFFERS)
    return AuditResult(
        speculator=subject.name,
        verifier=str(verifier.folder),
        engine=server.engine.name,
        version=server.version,
        model=server.model,
        endpoint=server.endpoint.url,
        suites=tuple(workload.suite for workload in workloads),
        prompts_digests=tuple(prompts_digest(workload.prompts) for workload in workloads),
        num_speculative_tokens=k,
        max_new_tokens=section.max_new_tokens,
        concurrency=concurrency,
        dtype=str(verifier.dtype).removeprefix("torch."),
        near_tie=describe_rounding(rounding),
        source=parts[0].source,
        tally=Tally.of(answers, predictions, rounds, k),
        differing=differing,
        patterns=find_patterns(rounds, k),
        explanations=_explanations(subject, speculator, trials, len(differing)) if differing else (),
    )


@attrs.frozen(kw_only=True, eq=False)
class _Trials:
    """Replays speculators on a server's answers."""

    answers: Sequence[ServedAnswer]
    verifier: Engine
    num_tokens: int
    rounding: torch.dtype
    progress: Progress
    _captured: dict[tuple[int, ...], Any] = attrs.field(factory=dict, init=False)

    def run(self, model: Replays, layer_ids: Sequence[int]) -> tuple[list[AuditedRound], list[Prediction]]:
        """Compares all rounds with the predictions of a speculator that reads the states of these layers."""
        key = tuple(layer_ids)
        if key not in self._captured:
            # Only the latest: states of many layers would not fit into memory.
            self._captured.clear()
            self._captured[key] = self._capture(key)
        captured = self._captured[key]
        drafts = replay_margins(model, [row for row, _ in captured], k_max=self.num_tokens)
        predictions = [
            Prediction(draft=draft, verifier=verifier, dtype=self.rounding)
            for draft, (_, verifier) in zip(drafts, captured, strict=True)
        ]
        return audit_rounds(self.answers, predictions, self.num_tokens), predictions

    def _capture(self, layer_ids: Sequence[int]) -> list[tuple[JudgedResponse, Margins]]:
        """Captures the states of the server's own tokens, of which none is cut off, and the verifier's margins."""
        head = load_head(self.verifier.folder, self.verifier.facts).to(self.verifier.device)
        tokens = [torch.tensor(answer.response.tokens) for answer in self.answers]
        captured: dict[int, tuple[JudgedResponse, Margins]] = {}
        for index, states, last in self.verifier.capture_all(tokens, layer_ids):
            response = self.answers[index].response
            row = JudgedResponse(response=response, hidden_states=states, log_p=None, cut=0)
            captured[index] = row, verifier_margins(head, response, last)
            done = len(captured)
            self.progress(ProgressEvent(stage="audit", done=done, total=len(tokens), unit="answers", note="capture"))
        return [captured[index] for index in range(len(tokens))]


def _explanations(
    subject: SavedSpeculator, model: SpeculatorModel, trials: _Trials, differing: int
) -> tuple[Explanation, ...]:
    """Tries speculators that servers load by mistake; the best first.

    Args:
        differing: rounds that the configured speculator does not predict.
    """
    with tempfile.TemporaryDirectory() as work:
        tried = []
        for what, todo, other, layer_ids in _others(subject, model, trials.verifier, Path(work)):
            rounds, _ = trials.run(other, layer_ids)
            agreeing = sum(each.verdict != DIFFERS for each in rounds)
            explains = len(rounds) - agreeing <= LEFT * differing
            tried.append(Explanation(what=what, todo=todo, agreeing=agreeing, explains=explains))
    return tuple(sorted(tried, key=lambda each: -each.agreeing))


def _others(
    subject: SavedSpeculator, model: SpeculatorModel, verifier: Engine, work: Path
) -> Iterator[tuple[str, str, Replays, Sequence[int]]]:
    """Yields (difference, remedy, speculator, layers whose states it reads)."""
    own = model.draft().target_layer_ids
    config = json.loads((subject.folder / "config.json").read_text(encoding="utf-8"))
    rope = config.get("transformer_layer_config", {}).get("rope_parameters") or {}
    if "rope_theta" in rope:
        right = float(rope["rope_theta"])
        for theta in sorted({*THETAS, *(right * factor for factor in ZEROS)} - {right}):
            what = f"it rotates positions with theta {theta:g} instead of {right:g}"
            other = _with_theta(subject.folder, config, theta, work / f"{theta:g}", verifier)
            yield what, f"serve a config.json with rope_theta {right:g}", other, own
    ids = model.draft_to_target
    if len(ids) < verifier.facts.vocab_size:
        what = "it takes the draft's ids for the verifier's (no d2t)"
        unmapped = _Remapped(model, torch.arange(len(ids), device=ids.device))
        yield what, "serve a checkpoint with d2t, in a form that this server reads", unmapped, own
    # Which other order does not matter: nothing is ever accepted.
    what = "its drafts are other tokens than the draft means (d2t in another order, or another head)"
    yield what, "serve the run's own d2t and head", _Remapped(model, ids.flip(0)), own
    for step in (-1, 1):
        layer_ids = [layer + step for layer in own]
        if layer_ids and min(layer_ids) >= 0 and max(layer_ids) <= verifier.num_layers:
            what = f"it reads the states of layers {layer_ids} instead of {list(own)}"
            todo = f"serve a config.json with layer ids {list(own)}, counted as this server counts them"
            yield what, todo, model, layer_ids


def _with_theta(folder: Path, config: dict[str, Any], theta: float, copy: Path, verifier: Engine) -> SpeculatorModel:
    """Loads a speculator with another rotary theta."""
    layers = config["transformer_layer_config"]
    rope = {**layers["rope_parameters"], "rope_theta": theta}
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file.resolve())
    (copy / "config.json").unlink()
    changed = {**config, "transformer_layer_config": {**layers, "rope_parameters": rope}}
    (copy / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    model = SpeculatorModel.from_pretrained(copy, verifier=verifier.folder)
    return place(model, verifier.device, beside=verifier.dtype)


class _Remapped:
    """A speculator whose draft ids stand for other tokens."""

    def __init__(self, model: Replays, draft_to_target: torch.Tensor) -> None:
        self.draft_to_target = draft_to_target
        self.replay = model.replay
