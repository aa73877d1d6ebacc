"""Checks that every value of config.json is still the one of training, whatever the algorithm."""

from __future__ import annotations

import json
from typing import Any

import torch

from speculators.contract import build_model
from speculators.doctor.check import Check, Family, listed
from speculators.doctor.speculator import ExaminedSpeculator, TrainingRun
from speculators.facts import VerifierFacts
from speculators.pipeline.arguments import training_kwargs
from speculators.recipe.plan import Plan
from speculators.recipe.values import leaves
from speculators.structure.origin import path_text

CONFIG = Family("config")
NAME = "as trained"
# Training does not determine these: the file's version, the verifier's location, the number of drafted tokens.
NOT_TRAINED = ("speculators_version", "speculators_config")


def check_trained(speculator: ExaminedSpeculator) -> Check:
    """Compares config.json with the one that follows from the run's recipe and lock."""
    if speculator.origin is None:
        return CONFIG.skipped(NAME, speculator.origin_problem)
    if speculator.config is None:
        return CONFIG.skipped(NAME, "config.json cannot be read: see the family loads")
    try:
        trained = as_trained(speculator.origin)
    # A plug-in's code may raise anything, for example because it needs the verifier's weights.
    except Exception as error:
        return CONFIG.skipped(NAME, f"the run's model cannot be built again: {type(error).__name__}: {error}")
    own = speculator.config.to_dict()
    expected, actual = _values(trained), _values({key: own.get(key) for key in trained})
    differ = [path for path in dict.fromkeys([*expected, *actual]) if actual.get(path) != expected.get(path)]
    if not differ:
        return CONFIG.ok(NAME, f"{len(expected)} values follow from the run's recipe and lock")
    changes = listed([f"{path} is {actual.get(path)}, training had {expected.get(path)}" for path in differ])
    values = listed([f"{path} = {json.dumps(expected.get(path))}" for path in differ])
    evidence = f"{changes}: config.json was changed after training, so it no longer describes the weights"
    return CONFIG.wrong(NAME, evidence, f"write {values} into config.json, or export again")


def as_trained(origin: TrainingRun) -> dict[str, Any]:
    """Derives the config.json of the run's model by building it on the meta device.

    Leaves out the fields that training takes over from its `init_from` checkpoint, which may be gone.
    """
    trained, section = origin.trained, origin.recipe.algorithm
    plan = Plan(
        recipe=origin.recipe,
        facts=VerifierFacts(origin.lock.verifier.config),
        target_layer_ids=tuple(trained["target_layer_ids"]),
        draft_vocab_size=trained["draft_vocab_size"],
        transformer_layer_config=trained["decoder"],
        row_tokens=trained["row_tokens"],
        rows_per_step=1,
        precision=origin.recipe.schedule.precision,
        world_size=1,
        stages=(),
    )
    reduced = plan.draft_vocab_size < plan.facts.vocab_size
    with torch.device("meta"):
        kwargs = training_kwargs(plan, None, torch.arange(plan.draft_vocab_size) if reduced else None)
        config = build_model(section.name, plan.facts, kwargs).config
    unknown = type(config).taken_over if section.config.init_from is not None else ()
    return {key: value for key, value in config.to_dict().items() if key not in unknown}


def _values(config: dict[str, Any]) -> dict[str, Any]:
    """Flattens a config to JSON values by path."""
    plain = json.loads(json.dumps(config))
    return {path_text(path): value for path, value in leaves((), plain) if path[0] not in NOT_TRAINED}
