"""`examine`: every check of one checkpoint, in the order in which one thing explains the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from speculators.bench.suites import load_suite
from speculators.doctor.alignment import Bench, check_acceptance, check_alignment
from speculators.doctor.answers import Answers
from speculators.doctor.check import FAMILIES, WRONG, Check, Diagnosis, Family
from speculators.doctor.config import check_config
from speculators.doctor.data import check_data
from speculators.doctor.frozen import check_frozen
from speculators.doctor.identity import check_head, check_identity, check_layers
from speculators.doctor.length import check_length
from speculators.doctor.loads import altered, build, read_files
from speculators.doctor.parity import check_parity
from speculators.doctor.stored import check_memorised, check_states
from speculators.doctor.subject import Origin, Patient
from speculators.doctor.trained import check_trained
from speculators.doctor.trials import FALSE_ALARM, Comparison, compare
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

# Prompts, and tokens of an answer: a few thousand drafts, which tell 5% of the acceptance from chance.
PROMPTS, NEW_TOKENS = 16, 128
RAISED, MEND = "the algorithm's code raised", "mend the algorithm, or config.json, where it points"


@attrs.frozen(kw_only=True)
class Wish:
    """What a person asks for.

    Attributes:
        suite: prompts to measure on; its first few.
        places: where runs keep their data.
        listen: gets events.
        answers: of the verifier, where they were made before.
    """

    suite: Suite
    places: Places = attrs.field(factory=Places)
    listen: Listen = ignore
    answers: Answers | None = None


def examine(subject: SavedSpeculator, wish: Wish) -> Diagnosis:
    """Makes every check that can be made; a checkpoint that cannot be loaded has at least those of its files.

    Raises:
        SpeculatorsError: the verifier cannot be had, or the prompts cannot be read.
    """
    began = time.monotonic()
    patient, checks = admit(subject, wish)
    told = ""
    if patient is None:
        checks += _skip(FAMILIES[1:], "the checkpoint's files cannot be read")
    else:
        engine = wish.answers.engine if wish.answers else _engine(subject, patient)
        checks += _guarded("config", lambda: (check_layers(patient), check_trained(patient), check_head(engine)))
        if problem := _unmeasurable(patient):
            checks += _on_files(patient, problem)
        else:
            answers = wish.answers or _answers(engine, patient, wish)
            told = f"{len(answers.rows)} greedy answers to {answers.source}"
            checks += _on_answers(patient, answers, wish)
            del answers
        checks += _guarded("config", lambda: check_identity(patient))
        checks += _guarded("data", lambda: [check_states(patient, engine, wish.places)])
        # The data has the verifier read it, too: one copy of it at a time.
        del engine
        with _stage(wish, "data"):
            checks += _guarded("data", lambda: check_data(patient, wish.places, wish.listen))
    return Diagnosis(
        speculator=str(subject.folder),
        algorithm="" if patient is None else str(patient.raw.get("speculators_model_type")),
        verifier="" if patient is None else str(patient.verifier),
        prompts=told,
        false_alarm=FALSE_ALARM,
        seconds=round(time.monotonic() - began, 1),
        checks=tuple(sorted(checks, key=lambda check: FAMILIES.index(check.family))),
    )


def admit(subject: SavedSpeculator, wish: Wish) -> tuple[Patient | None, list[Check]]:
    """Reads the checkpoint, obtains its verifier, and builds the model as far as that works."""
    if subject.recipe is not None:
        import_algorithm(subject.recipe["algorithm"], subject.folder.parent)
    raw, tensors, checks = read_files(subject.folder)
    if raw is None or tensors is None:
        return None, checks
    origin, why = Origin.of(subject.folder)
    folder = obtain(verifier_of(_named(subject, raw)), progress=wish.listen)
    patient = Patient(
        folder=subject.folder,
        raw=raw,
        tensors=tensors,
        verifier=folder,
        facts=VerifierFacts.read(folder / "config.json"),
        origin=origin,
        no_origin=why,
        device=local_device(),
    )
    checks += _guarded("loads", lambda: altered(subject.folder, origin))
    checks += _guarded("loads", lambda: build(patient))
    return patient, checks


def _named(subject: SavedSpeculator, raw: Mapping[str, Any]) -> SavedSpeculator:
    """Returns the subject with the verifier that config.json names where nobody else does; it need not be a config."""
    if subject.recipe is not None or subject.verifier is not None:
        return subject
    held = raw.get("speculators_config")
    named = held.get("verifier") if isinstance(held, dict) else None
    name = named.get("name_or_path") if isinstance(named, dict) else None
    return attrs.evolve(subject, verifier=name) if isinstance(name, str) and name else subject


def _engine(subject: SavedSpeculator, patient: Patient) -> Engine:
    """Loads the verifier in the dtype of the run, or in that of the checkpoint."""
    section = verifier_of(_named(subject, patient.raw))
    told = subject.recipe is not None and subject.verifier is None
    saved = [tensor.dtype for tensor in patient.tensors.values() if tensor.is_floating_point()]
    return Engine(
        patient.verifier,
        dtype=section.dtype if told else max(saved, key=lambda kind: kind.itemsize, default=torch.float32),
        device=patient.device,
        trust_remote_code=section.trust_remote_code,
    )


def _answers(engine: Engine, patient: Patient, wish: Wish) -> Answers:
    """Lets the verifier answer the prompts; the states around those that the draft reads come with the same pass."""
    ids = {layer + step for layer in patient.layer_ids or () for step in (-1, 0, 1)}
    prompts = load_suite(attrs.evolve(wish.suite, take=min(PROMPTS, wish.suite.take or PROMPTS)))
    with _stage(wish, "answers"):
        return Answers.of(
            engine,
            prompts,
            sorted(ids),
            max_new_tokens=NEW_TOKENS,
            source=f"{len(prompts)} prompts of {wish.suite.name}",
            progress=wish.listen,
        )


def _on_files(patient: Patient, problem: str) -> list[Check]:
    """Makes the checks that need no replay."""
    checks = _guarded("config", lambda: check_config(patient, lambda _: None))
    if patient.model is not None:
        checks += _guarded("loads", lambda: check_vocabulary(patient))
        checks += _guarded("loads", lambda: check_frozen(patient, accepts=None))
    return checks + _skip(("alignment", "parity", "length"), problem)


def _on_answers(patient: Patient, answers: Answers, wish: Wish) -> list[Check]:
    """Makes the checks that replay the draft, and those that are judged by it."""
    bench = Bench(patient, answers)
    try:
        with _stage(wish, "alignment"):
            acceptance = check_acceptance(bench)
            checks = [acceptance, *_guarded("alignment", lambda: check_alignment(bench))]
    except SpeculatorsError as error:
        return _on_files(patient, str(error))
    # The algorithm's code may be somebody else's, and raise anything.
    except Exception as error:
        words = f"{RAISED} {type(error).__name__}: {error}"
        return [
            Family("alignment").wrong("acceptance", words, MEND),
            *_on_files(patient, "the draft cannot be replayed"),
        ]
    checks += _guarded("loads", lambda: check_vocabulary(patient))
    checks += _guarded("loads", lambda: check_frozen(patient, accepts=acceptance.result != WRONG))
    checks += _guarded("config", lambda: check_config(patient, _attempts(bench)))
    with _stage(wish, "parity"):
        checks += _guarded("parity", lambda: check_parity(bench))
    with _stage(wish, "length"):
        checks += _guarded("length", lambda: check_length(bench))
    checks += _guarded("data", lambda: [check_memorised(bench, wish.places)])
    return checks


def _unmeasurable(patient: Patient) -> str:
    """Returns why drafts cannot be replayed, "" if they can."""
    if patient.model is None:
        return "the checkpoint cannot be loaded"
    missing = type(patient.model).missing_hooks()
    return f"the algorithm has no {' and no '.join(missing)} (speculators/model.py)" if missing else ""


def _attempts(bench: Bench) -> Callable[[Mapping[str, Any]], Comparison | None]:
    """Returns what tries other values of the decoder's config with the same weights."""

    def attempt(changes: Mapping[str, Any]) -> Comparison | None:
        try:
            model = bench.patient.with_config(transformer_layer_config={**bench.patient.decoder, **changes})
        # Weights that do not fit, or values that the algorithm does not take: nothing can be tried.
        except (SpeculatorsError, RuntimeError, ValueError, KeyError, TypeError):
            return None
        return compare(bench.configured, bench.attempt_with(model))

    return attempt


def _guarded(family: str, checks: Callable[[], Iterable[Check]]) -> list[Check]:
    """Returns the checks of a family; what they cannot go on from is the last of them."""
    found: list[Check] = []
    try:
        for check in checks():
            found.append(check)
    except (SpeculatorsError, OSError) as error:
        found.append(Family(family).skipped("the rest", str(error)))
    # The algorithm's code may be somebody else's, and raise anything.
    except Exception as error:
        words = f"{RAISED} {type(error).__name__}: {error}"
        found.append(Family(family).wrong("the rest", words, MEND))
    return found


def _skip(families: Sequence[str], why: str) -> list[Check]:
    return [Family(family).skipped("all", why) for family in families]


@contextmanager
def _stage(wish: Wish, name: str) -> Iterator[None]:
    """Tells how long a part takes."""
    began = time.monotonic()
    wish.listen(StageEvent(stage=name, status="start"))
    yield
    wish.listen(StageEvent(stage=name, status="done", seconds=time.monotonic() - began))
