"""`examine`: every check of one speculator, ordered so that earlier checks explain later ones."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import attrs
import torch

from speculators.bench.suites import load_suite
from speculators.doctor.acceptance import explained
from speculators.doctor.answers import Answers
from speculators.doctor.check import FAMILIES, Check, Diagnosis
from speculators.doctor.data import check_data
from speculators.doctor.effort import FULL, LEFT_OUT, Effort
from speculators.doctor.guard import guarded, skip, stage
from speculators.doctor.identity import check_head, check_identity, check_layers
from speculators.doctor.loads import altered, build, read_files
from speculators.doctor.measured import check_answers, check_files
from speculators.doctor.paired import FALSE_ALARM
from speculators.doctor.speculator import ExaminedSpeculator, TrainingRun
from speculators.doctor.stored import check_states
from speculators.doctor.trained import check_trained
from speculators.events import Listen, ignore
from speculators.facts import VerifierFacts
from speculators.pipeline.measure import SavedSpeculator, import_algorithm, verifier_of
from speculators.recipe.schema import Suite
from speculators.runs.places import Places
from speculators.training.world import local_device
from speculators.verifier.engine import Engine
from speculators.verifier.sources import obtain


def examine(
    subject: SavedSpeculator,
    suite: Suite,
    *,
    effort: Effort = FULL,
    places: Places | None = None,
    listen: Listen = ignore,
    answers: Answers | None = None,
) -> Diagnosis:
    """Runs every check that the speculator allows; an unloadable checkpoint still gets the checks of its files.

    Args:
        subject: the speculator's folder, with its recipe or verifier.
        suite: source of the prompts; only the first few are used.
        effort: how much to measure.
        places: where runs keep their data; None for the defaults.
        listen: receives events.
        answers: the verifier's answers, if they exist already.

    Raises:
        SpeculatorsError: the verifier cannot be obtained, or the prompts cannot be read.
    """
    places = places or Places()
    began = time.monotonic()
    speculator, checks = admit(subject, listen)
    prompts = ""
    if speculator is None:
        checks += skip(FAMILIES[1:], "the checkpoint's files cannot be read")
    else:
        engine = answers.engine if answers else _engine(subject, speculator)
        checks += guarded("config", lambda: (check_layers(speculator), check_trained(speculator), check_head(engine)))
        if problem := _unmeasurable(speculator):
            checks += check_files(speculator, problem)
        else:
            answers = answers or _answers(engine, speculator, suite, effort, listen)
            prompts = f"{len(answers.rows)} greedy answers to {answers.source}"
            checks += check_answers(speculator, answers, effort, places, listen)
            answers = None
        checks += guarded("config", lambda: check_identity(speculator, hashes=effort.thorough))
        if effort.thorough:
            checks += guarded("data", lambda: [check_states(speculator, engine, places)])
            # The checks of the data load the verifier again: free this copy first.
            del engine
            with stage(listen, "data"):
                checks += guarded("data", lambda: check_data(speculator, places, listen))
        else:
            checks += skip(("data",), LEFT_OUT)
    return Diagnosis(
        speculator=str(subject.folder),
        algorithm="" if speculator is None else str(speculator.raw.get("speculators_model_type")),
        verifier="" if speculator is None else str(speculator.verifier),
        prompts=prompts,
        false_alarm=FALSE_ALARM,
        seconds=round(time.monotonic() - began, 1),
        checks=tuple(sorted(explained(checks), key=lambda check: FAMILIES.index(check.family))),
    )


def admit(subject: SavedSpeculator, listen: Listen = ignore) -> tuple[ExaminedSpeculator | None, list[Check]]:
    """Reads the checkpoint, obtains its verifier, and builds the model if the files allow."""
    if subject.recipe is not None:
        import_algorithm(subject.recipe["algorithm"], subject.folder.parent)
    raw, tensors, checks = read_files(subject.folder)
    if raw is None or tensors is None:
        return None, checks
    origin, why = TrainingRun.of(subject.folder)
    folder = obtain(verifier_of(_named(subject, raw)), progress=listen)
    speculator = ExaminedSpeculator(
        folder=subject.folder,
        raw=raw,
        tensors=tensors,
        verifier=folder,
        facts=VerifierFacts.read(folder / "config.json"),
        origin=origin,
        origin_problem=why,
        device=local_device(),
    )
    checks += guarded("loads", lambda: altered(subject.folder, origin))
    checks += guarded("loads", lambda: build(speculator))
    return speculator, checks


def _named(subject: SavedSpeculator, raw: Mapping[str, Any]) -> SavedSpeculator:
    """Adds the verifier that config.json names, unless a recipe or the user names one; `raw` may be any JSON."""
    if subject.recipe is not None or subject.verifier is not None:
        return subject
    table = raw.get("speculators_config")
    verifier = table.get("verifier") if isinstance(table, dict) else None
    name = verifier.get("name_or_path") if isinstance(verifier, dict) else None
    return attrs.evolve(subject, verifier=name) if isinstance(name, str) and name else subject


def _engine(subject: SavedSpeculator, speculator: ExaminedSpeculator) -> Engine:
    """Loads the verifier in the run's dtype, or in the checkpoint's if there is no run."""
    section = verifier_of(_named(subject, speculator.raw))
    from_run = subject.recipe is not None and subject.verifier is None
    saved = [tensor.dtype for tensor in speculator.tensors.values() if tensor.is_floating_point()]
    return Engine(
        speculator.verifier,
        dtype=section.dtype if from_run else max(saved, key=lambda kind: kind.itemsize, default=torch.float32),
        device=speculator.device,
        section=section,
    )


def _answers(engine: Engine, speculator: ExaminedSpeculator, suite: Suite, effort: Effort, listen: Listen) -> Answers:
    """Generates the answers, and captures in the same pass the layers around those that the draft reads."""
    ids = {layer + step for layer in speculator.layer_ids or () for step in (-1, 0, 1)}
    prompts = load_suite(attrs.evolve(suite, take=min(effort.prompts, suite.take or effort.prompts)))
    with stage(listen, "answers"):
        return Answers.of(
            engine,
            prompts,
            sorted(ids),
            max_new_tokens=effort.new_tokens,
            source=f"{len(prompts)} prompts of {suite.name}",
            progress=listen,
        )


def _unmeasurable(speculator: ExaminedSpeculator) -> str:
    """Explains why drafts cannot be replayed; "" if they can."""
    if speculator.model is None:
        return "the checkpoint cannot be loaded"
    missing = type(speculator.model).missing_hooks()
    return f"the algorithm has no {' and no '.join(missing)} (speculators/model.py)" if missing else ""
