"""Counts a speculator, its verifier and its data before there are weights."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch

from speculators.contract import build_model, parameter_counts
from speculators.cost.costs import Amount, Costs, VerifierCost
from speculators.cost.trace import trace
from speculators.data.batches import pack
from speculators.data.encoded import Conversations
from speculators.data.sources import count_rows
from speculators.data.store_layout import store_bytes
from speculators.errors import ArtifactError
from speculators.facts import VerifierFacts
from speculators.pipeline.arguments import stand_in_vocabulary, training_kwargs
from speculators.recipe.plan import Plan
from speculators.runs.places import Places
from speculators.verifier.architecture import Skeleton, decoder_layers

# Modules that a token is routed to: it meets only some of them.
_EXPERTS = ".experts."
_FULL = "full_attention"


def with_parameters(plan: Plan) -> Plan:
    """Adds parameter counts to a plan: the model is built in full, from tensors without storage.

    Raises:
        Exception: whatever a plug-in's `from_training_args` raises where it gets no verifier to read weights from.
    """
    with torch.device("meta"):
        kwargs = training_kwargs(plan, None, stand_in_vocabulary(plan))
        model = build_model(plan.recipe.algorithm.name, plan.facts, kwargs)
    return attrs.evolve(plan, parameters=parameter_counts(model))


def verifier_cost(facts: VerifierFacts) -> VerifierCost:
    """Counts the verifier from its config.json; the architecture is built from tensors without storage.

    Raises:
        VerifierError: transformers cannot build it.
    """
    model = Skeleton.of(facts).model
    routed = _routed_share(facts)
    layers = decoder_layers(model)
    matrices = [(name, parameter) for name, parameter in layers.named_parameters() if parameter.ndim > 1]
    kinds = facts.get("layer_types") or []
    attending = sum(kind == _FULL for kind in kinds) or len(layers)
    return VerifierCost(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_parameters=sum(parameter.numel() for parameter in layers.parameters()),
        products=round(sum(p.numel() * (routed if _EXPERTS in name else 1) for name, p in matrices)),
        # Two products of a head's width with each key: scores, and the mean of the values.
        attention=4 * facts.num_attention_heads * facts.head_dim * attending,
    )


def _routed_share(facts: VerifierFacts) -> float:
    """Computes the share of the experts that a token is routed to; 1 without experts."""
    experts, met = facts.experts()
    return met / experts if experts else 1.0


def costs_of(
    plan: Plan, places: Places, *, kind: str, conversations: int | None = None, mean_tokens: int | None = None
) -> Costs:
    """Counts the costs of a plan.

    Args:
        kind: type of the device, "cpu" or "cuda", on which a row is computed.
        conversations, mean_tokens: of data that is not prepared yet; None takes the most that the recipe allows.

    Raises:
        VerifierError: the verifier's architecture cannot be built.
        Exception: whatever a plug-in raises where it is built or run without values.
    """
    prepared = _prepared(plan, places)
    mean = mean_tokens or plan.recipe.data.max_tokens
    if prepared is None:
        amount = _bounded(plan, conversations, mean)
    else:
        amount, mean = _counted(plan, prepared), max(1, round(float(prepared.lengths.mean())))
    documents = max(1, plan.row_tokens // mean)
    # The last layer is stored once.
    width, states = plan.facts.hidden_size, len(plan.target_layer_ids) - plan.ends_in_last
    return Costs(
        plan=plan,
        row=trace(plan, _split(plan.row_tokens, documents), amount.supervised, kind=kind),
        verifier=verifier_cost(plan.facts),
        amount=amount,
        mean_tokens=mean,
        state_bytes=store_bytes(1, aux_width=states * width, width=width, dtype=plan.recipe.data.states_dtype),
    )


def _split(tokens: int, parts: int) -> list[int]:
    """Splits a row into documents of nearly equal lengths."""
    return [tokens // parts + (index < tokens % parts) for index in range(parts)]


def _prepared(plan: Plan, places: Places) -> Conversations | None:
    try:
        return Conversations.open(places.prepared(plan), key=plan.stage("prepare").fingerprint)
    except ArtifactError:
        return None


def _counted(plan: Plan, prepared: Conversations) -> Amount:
    """Counts prepared data; the number of updates is what the packing will give."""
    schedule, total = plan.recipe.schedule, int(prepared.lengths.sum())
    epochs = 1 if schedule.max_steps else schedule.epochs
    seed, rows = plan.recipe.seed, plan.rows_per_step
    packed = [len(pack(prepared.lengths, row_tokens=plan.row_tokens, seed=seed, epoch=e)) for e in range(epochs)]
    updates = schedule.max_steps or sum(-(-count // rows) for count in packed)
    trained = round(updates * rows * total / packed[0]) if schedule.max_steps else epochs * total
    return Amount(
        conversations=len(prepared),
        tokens=total,
        supervised=float(prepared.supervised.sum() / max(1, total)),
        updates=updates,
        trained=trained,
        counted=True,
    )


def _bounded(plan: Plan, conversations: int | None, mean: int) -> Amount:
    """Bounds the data by what the recipe allows: every conversation of full length, all of it supervised."""
    schedule = plan.recipe.schedule
    count = conversations or _conversations(plan)
    tokens = None if count is None else count * mean
    updates = schedule.max_steps
    if updates is None and tokens is not None:
        updates = schedule.epochs * -(-tokens // schedule.tokens_per_step)
    trained = None if tokens is None else schedule.epochs * tokens
    if schedule.max_steps is not None:
        trained = schedule.max_steps * schedule.tokens_per_step
    return Amount(conversations=count, tokens=tokens, supervised=1.0, updates=updates, trained=trained, counted=False)


def _conversations(plan: Plan) -> int | None:
    """Counts the rows of all sources; None if a data set of the hub is used whole."""
    counts = [count_rows(source, Path()) for source in plan.recipe.data.sources]
    return None if None in counts else sum(counts)  # type: ignore[arg-type]
