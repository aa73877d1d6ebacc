"""`examine`: every check of one speculator, ordered so that earlier checks explain later ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from speculators.bench.suites import load_suite
from speculators.doctor.alignment import DraftTrials, check_acceptance, check_alignment
from speculators.doctor.answers import Answers
from speculators.doctor.check import FAMILIES, WRONG, Check, Diagnosis, Family
from speculators.doctor.config import check_config
from speculators.doctor.data import check_data
from speculators.doctor.frozen import check_frozen
from speculators.doctor.identity import check_head, check_identity, check_layers
from speculators.doctor.length import check_length
from speculators.doctor.loads import altered, build, read_files
from speculators.doctor.parity import check_parity
from speculators.doctor.speculator import ExaminedSpeculator, TrainingRun
from speculators.doctor.stored import check_memorised, check_states
from speculators.doctor.trained import check_trained
from speculators.doctor.trials import FALSE_ALARM, TrialComparison, compare
from speculators.doctor.vocabulary import check_vocabulary
from speculators.errors import SpeculatorsError
from speculators.events import Listen, StageEvent, ignore
from speculators.facts import VerifierFacts
from speculators.pipeline.measure import SavedSpeculator, import_algorithm, verifier_of
from speculators.recipe.schema import Suite
from speculators.runs.places import Places
from speculators.training.world import local_device
from speculators.verifier.engine import Engine
from speculators.verifier.sources import obtain

# Number of prompts and tokens per answer: a few thousand drafts separate a 5% change of acceptance from chance.
PROMPTS, NEW_TOKENS = 16, 128
RAISED, MEND = "the algorithm's code raised", "fix the algorithm's code, or the value of config.json that it names"


def examine(
    subject: SavedSpeculator,
    suite: Suite,
    *,
    places: Places | None = None,
    listen: Listen = ignore,
    answers: Answers | None = None,
) -> Diagnosis:
    """Runs every check that the speculator allows; an unloadable checkpoint still gets the checks of its files.

    Args:
        subject: the speculator's folder, with its recipe or verifier.
        suite: source of the prompts; only the first few are used.
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
        checks += _skip(FAMILIES[1:], "the checkpoint's files cannot be read")
    else:
        engine = answers.engine if answers else _engine(subject, speculator)
        checks += _guarded("config", lambda: (check_layers(speculator), check_trained(speculator), check_head(engine)))
        if problem := _unmeasurable(speculator):
            checks += _on_files(speculator, problem)
        else:
            answers = answers or _answers(engine, speculator, suite, listen)
            prompts = f"{len(answers.rows)} greedy answers to {answers.source}"
            checks += _on_answers(speculator, answers, places, listen)
            answers = None
        checks += _guarded("config", lambda: check_identity(speculator))
        checks += _guarded("data", lambda: [check_states(speculator, engine, places)])
        # The checks of the data load the verifier again: free this copy first.
        del engine
        with _stage(listen, "data"):
            checks += _guarded("data", lambda: check_data(speculator, places, listen))
    return Diagnosis(
        speculator=str(subject.folder),
        algorithm="" if speculator is None else str(speculator.raw.get("speculators_model_type")),
        verifier="" if speculator is None else str(speculator.verifier),
        prompts=prompts,
        false_alarm=FALSE_ALARM,
        seconds=round(time.monotonic() - began, 1),
        checks=tuple(sorted(checks, key=lambda check: FAMILIES.index(check.family))),
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
    checks += _guarded("loads", lambda: altered(subject.folder, origin))
    checks += _guarded("loads", lambda: build(speculator))
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


def _answers(engine: Engine, speculator: ExaminedSpeculator, suite: Suite, listen: Listen) -> Answers:
    """Generates the answers, and captures in the same pass the layers around those that the draft reads."""
    ids = {layer + step for layer in speculator.layer_ids or () for step in (-1, 0, 1)}
    prompts = load_suite(attrs.evolve(suite, take=min(PROMPTS, suite.take or PROMPTS)))
    with _stage(listen, "answers"):
        return Answers.of(
            engine,
            prompts,
            sorted(ids),
            max_new_tokens=NEW_TOKENS,
            source=f"{len(prompts)} prompts of {suite.name}",
            progress=listen,
        )


def _on_files(speculator: ExaminedSpeculator, problem: str) -> list[Check]:
    """Runs the checks that need no replay, and reports the others as not checked."""
    checks = _guarded("config", lambda: check_config(speculator, lambda _: None))
    if speculator.model is not None:
        checks += _guarded("loads", lambda: check_vocabulary(speculator))
        checks += _guarded("loads", lambda: check_frozen(speculator, accepts=None))
    return checks + _skip(("alignment", "parity", "length"), problem)


def _on_answers(speculator: ExaminedSpeculator, answers: Answers, places: Places, listen: Listen) -> list[Check]:
    """Runs the checks that replay the draft, and those that depend on its acceptance."""
    trials = DraftTrials(speculator, answers)
    try:
        with _stage(listen, "alignment"):
            acceptance = check_acceptance(trials)
            checks = [acceptance, *_guarded("alignment", lambda: check_alignment(trials))]
    except SpeculatorsError as error:
        return _on_files(speculator, str(error))
    # A plug-in's code may raise anything.
    except Exception as error:
        evidence = f"{RAISED} {type(error).__name__}: {error}"
        return [
            Family("alignment").wrong("acceptance", evidence, MEND),
            *_on_files(speculator, "the draft cannot be replayed"),
        ]
    checks += _guarded("loads", lambda: check_vocabulary(speculator))
    checks += _guarded("loads", lambda: check_frozen(speculator, accepts=acceptance.result != WRONG))
    checks += _guarded("config", lambda: check_config(speculator, _attempts(trials)))
    with _stage(listen, "parity"):
        checks += _guarded("parity", lambda: check_parity(trials))
    with _stage(listen, "length"):
        checks += _guarded("length", lambda: check_length(trials))
    checks += _guarded("data", lambda: [check_memorised(trials, places)])
    return checks


def _unmeasurable(speculator: ExaminedSpeculator) -> str:
    """Explains why drafts cannot be replayed; "" if they can."""
    if speculator.model is None:
        return "the checkpoint cannot be loaded"
    missing = type(speculator.model).missing_hooks()
    return f"the algorithm has no {' and no '.join(missing)} (speculators/model.py)" if missing else ""


def _attempts(trials: DraftTrials) -> Callable[[Mapping[str, Any]], TrialComparison | None]:
    """Makes the function that replays other values of the decoder's config with the same weights."""

    def attempt(changes: Mapping[str, Any]) -> TrialComparison | None:
        try:
            model = trials.speculator.with_config(transformer_layer_config={**trials.speculator.decoder, **changes})
        # The weights do not fit, or the algorithm rejects the values.
        except (SpeculatorsError, RuntimeError, ValueError, KeyError, TypeError):
            return None
        return compare(trials.configured, trials.attempt_with(model))

    return attempt


def _guarded(family: str, checks: Callable[[], Iterable[Check]]) -> list[Check]:
    """Collects the checks of a family; an error that stops them becomes the last check."""
    collected: list[Check] = []
    try:
        for check in checks():
            collected.append(check)
    except (SpeculatorsError, OSError) as error:
        collected.append(Family(family).skipped("the rest", str(error)))
    # A plug-in's code may raise anything.
    except Exception as error:
        evidence = f"{RAISED} {type(error).__name__}: {error}"
        collected.append(Family(family).wrong("the rest", evidence, MEND))
    return collected


def _skip(families: Sequence[str], why: str) -> list[Check]:
    return [Family(family).skipped("all", why) for family in families]


@contextmanager
def _stage(listen: Listen, name: str) -> Iterator[None]:
    """Reports start, end and duration of a group of checks."""
    began = time.monotonic()
    listen(StageEvent(stage=name, status="start"))
    yield
    listen(StageEvent(stage=name, status="done", seconds=time.monotonic() - began))
