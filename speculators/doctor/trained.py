"""Does config.json still say what the run was trained with: every value of it, whatever the algorithm."""

from __future__ import annotations

import json
from typing import Any

import torch

from speculators.contract import build_model
from speculators.doctor.check import Check, Family, listed
from speculators.doctor.subject import Origin, Patient
from speculators.facts import VerifierFacts
from speculators.pipeline.arguments import training_kwargs
from speculators.recipe.plan import Plan
from speculators.recipe.values import leaves
from speculators.structure.origin import path_text

CONFIG = Family("config")
NAME = "as trained"
# Who wrote the file, where the verifier is, and how many tokens a server drafts: training knows nothing of these.
NOT_TRAINED = ("speculators_version", "speculators_config")


def check_trained(patient: Patient) -> Check:
    """Compares config.json with the one that the run's recipe and lock give."""
    if patient.origin is None:
        return CONFIG.skipped(NAME, f"nothing records what it was trained with: {patient.no_origin}")
    if patient.config is None:
        return CONFIG.skipped(NAME, "config.json cannot be read: see the checks of loads")
    try:
        trained = as_trained(patient.origin)
    # The algorithm's code may be somebody else's, and need the verifier's weights, which are not given here.
    except Exception as error:
        return CONFIG.skipped(NAME, f"the run's model cannot be built again: {type(error).__name__}: {error}")
    here = patient.config.to_dict()
    wanted, held = _values(trained), _values({key: here.get(key) for key in trained})
    differ = [path for path in dict.fromkeys([*wanted, *held]) if held.get(path) != wanted.get(path)]
    if not differ:
        return CONFIG.ok(NAME, f"{len(wanted)} values, as the run's recipe and lock give them")
    told = listed([f"{path} is {held.get(path)}, training had {wanted.get(path)}" for path in differ])
    back = listed([f"{path} = {json.dumps(wanted.get(path))}" for path in differ])
    words = f"{told}: config.json was changed after training, and the weights mean something else by it"
    return CONFIG.wrong(NAME, words, f"write into config.json {back}, or export again")


def as_trained(origin: Origin) -> dict[str, Any]:
    """Returns the config.json of the run's model, which is built of tensors without storage.

    What training takes over from the checkpoint that it starts from is left out: only that knows it.
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
    """Returns each value by its path, as JSON has it."""
    plain = json.loads(json.dumps(config))
    return {path_text(path): value for path, value in leaves((), plain) if path[0] not in NOT_TRAINED}
