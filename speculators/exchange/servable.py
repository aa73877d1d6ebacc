"""Says, from a recipe and before training, which servers would read its drafts as they are trained. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from speculators.config import ProposalConfig, SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators.facts import VerifierFacts
from speculators.formats.decoder import FULL
from speculators.formats.find import layouts_of
from speculators.formats.server_layout import SERVERS, SGLANG, VLLM, ServerLayout
from speculators.recipe.decoder import draft_decoder_config
from speculators.recipe.schema import Recipe

# Rotary embeddings that our drafts and the server compute alike.
ROPE_TYPES = {
    VLLM: ("default", "linear", "dynamic", "yarn", "longrope", "llama3"),
    SGLANG: ("default", "linear", "dynamic", "yarn", "longrope", "llama3"),
}


def layer_ids(config: Any) -> tuple[int, ...]:
    """Reads which of the verifier's states a saved config fuses; () if it names none."""
    values = {field.name: getattr(config, field.name) for field in attrs.fields(type(config))}
    ids = [value for name, value in values.items() if name.endswith("layer_ids") and value]
    return tuple(ids[0]) if ids else ()


def config_refusals(config: Any, server: str, facts: VerifierFacts | None) -> list[str]:
    """Lists options of a config that a server ignores or misreads, each with the reason."""
    refusals = _decoder_refusals(config.transformer_layer_config, server)
    ids = layer_ids(config)
    if list(ids) != sorted({*ids}):
        refusals.append(f"layer ids {list(ids)}: servers capture distinct states in ascending order")
    if facts is not None and ids and ids[-1] > facts.num_hidden_layers:
        refusals.append(f"layer ids {list(ids)}: the verifier has {facts.num_hidden_layers} layers")
    if server == SGLANG and facts is not None and facts.num_hidden_layers in ids:
        refusals.append(
            f"layer id {ids[-1]}: SGLang captures what enters a layer, and nothing enters the one after the last"
        )
    return refusals


def _decoder_refusals(decoder: dict[str, Any], server: str) -> list[str]:
    refusals, name = [], SERVERS[server]
    rope = decoder.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES[server]:
        refusals.append(f"rope_type {kind!r}: {name} knows {', '.join(ROPE_TYPES[server])}")
    if rope and "rope_theta" not in rope:
        refusals.append("rope_parameters lack rope_theta: each program has its own default")
    types = {*decoder.get("layer_types", ())}
    if len(types) > 1:
        refusals.append(
            f"layer_types mixes {', '.join(sorted(types))}: {name} derives one mask for all layers of a draft"
        )
    window = decoder.get("sliding_window")
    if window is not None and FULL in types:
        refusals.append(f"sliding_window {window} with layer_types {FULL}: {name} would attend without the window")
    if server == SGLANG and window is not None:
        refusals.append("sliding_window: SGLang takes a draft's window from its command line, not from config.json")
    if server == SGLANG and rope.get("partial_rotary_factor", 1.0) != 1.0:
        refusals.append("partial_rotary_factor: SGLang's draft layer rotates whole heads")
    return refusals


@attrs.frozen(kw_only=True)
class Serving:
    """Whether one server reads the drafts of a recipe.

    Attributes:
        server: its name in messages.
        reasons: why it would not draft what is trained, each as "option: reason"; () if it does.
    """

    server: str
    reasons: tuple[str, ...]


def servers_of(recipe: Recipe, facts: VerifierFacts) -> tuple[Serving, ...]:
    """Asks every known server, before anything is trained, whether it would read the recipe's drafts.

    What only the weights and the data decide is checked on export: a token that ends a turn and cannot be drafted,
    values that are not finite.

    Raises:
        RecipeError: the verifier's config.json lacks values that the draft inherits.
    """
    return servers_reading(recipe.algorithm.config, facts, k=recipe.benchmark.num_speculative_tokens[0])


def servers_reading(config: SpeculatorModelConfig, facts: VerifierFacts, *, k: int) -> tuple[Serving, ...]:
    """Asks every known server about drafts with a recipe's config and K; see `servers_of`."""
    layouts = {each.server: each for each in layouts_of(config.speculators_model_type)}
    planned = _planned(config, facts, k)
    return tuple(
        Serving(server=name, reasons=_reasons(planned, facts, layouts.get(server))) for server, name in SERVERS.items()
    )


def servers_line(serving: Sequence[Serving]) -> str:
    """Formats who serves the drafts, and what keeps the others away: "vLLM; not SGLang: norm_before_residual"."""
    able = [each.server for each in serving if not each.reasons]
    unable = [f"not {each.server}: {', '.join(map(_option, each.reasons))}" for each in serving if each.reasons]
    return "; ".join([", ".join(able) or "no server", *unable])


def _option(reason: str) -> str:
    return reason.partition(":")[0]


def _reasons(config: Any, facts: VerifierFacts, layout: ServerLayout | None) -> tuple[str, ...]:
    if layout is None:
        return (f"it has no layout for the algorithm {config.speculators_model_type}",)
    config = layout.as_trained(config, facts)
    return (*config_refusals(config, layout.server, facts), *layout.refusals(config))


def _planned(config: SpeculatorModelConfig, facts: VerifierFacts, k: int) -> Any:
    """Fills in what training will write to config.json, as far as servers read it."""
    return attrs.evolve(
        config,
        target_layer_ids=config.layer_ids(facts.num_hidden_layers),
        draft_vocab_size=config.draft_vocab_size or facts.vocab_size,
        transformer_layer_config=draft_decoder_config(facts, config),
        speculators_config=SpeculatorsConfig(
            algorithm=config.speculators_model_type,
            proposal_methods=(ProposalConfig(speculative_tokens=k),),
            verifier=VerifierConfig(name_or_path=facts.source),
        ),
    )
