"""What a speculator's config.json holds, and the frozen view of its verifier's config.json. No torch here."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import attrs

from speculators.errors import RegistryError
from speculators.facts import VerifierFacts
from speculators.registry import Registry, near_miss

C = TypeVar("C", bound=type)

ENTRY_POINTS = "speculators.models"

# The layout of config.json and weight names that vLLM reads; not the version of this package.
LAYOUT_VERSION = "0.9.0"

# The losses that speculators.losses registers, which a recipe is checked against without torch.
LOSSES = ("ce", "jsd", "kl_div", "lk_hybrid", "nla", "rkl", "tv")

# Of a draft's layers, of tokens drafted a round, of depths that training unrolls; published drafts have 16 at most.
MOST = 64


def derived(default: Any = attrs.NOTHING, **kwargs: Any) -> Any:
    """Declares a config field that the build fills in: written to config.json, never a key of a recipe."""
    return attrs.field(default=default, metadata={"derived": True}, **kwargs)


def knob(default: Any = attrs.NOTHING, **kwargs: Any) -> Any:
    """Declares a config field that only training reads: a key of `[algorithm]`, never written to config.json."""
    return attrs.field(default=default, metadata={"knob": True}, **kwargs)


def positive(_: object, __: attrs.Attribute[Any], value: Any) -> None:
    """attrs validator: None, or a number > 0."""
    if value is not None and value <= 0:
        raise ValueError(f"must be > 0, got {value!r}")


def few(_: object, __: attrs.Attribute[Any], value: int) -> None:
    """attrs validator: 1 <= value <= MOST; above, something else was meant."""
    positive(_, __, value)
    if value > MOST:
        raise ValueError(f"must be at most {MOST}, got {value}")


def known_losses(_: object, __: attrs.Attribute[Any], value: dict[str, float]) -> None:
    """attrs validator: weights >= 0 of losses that there are, one of them > 0."""
    for name in value:
        if name not in LOSSES:
            hint = near_miss(name, list(LOSSES))
            raise ValueError(f"no loss {name!r}; there are: {', '.join(LOSSES)}{f'; {hint}' if hint else ''}")
    if not value or min(value.values()) < 0 or sum(value.values()) <= 0:
        raise ValueError(f"must give at least one loss a weight > 0 and none one below 0, got {value}")


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Returns (2, N//2, N-3), and for N < 7 the nearest distinct ids in 0..N.

    Args:
        num_layers: layers of the verifier (N).
    """
    middle = num_layers // 2
    wanted = {min(2, middle - 1), middle, max(num_layers - 3, middle + 1)}
    return tuple(sorted({min(max(layer, 0), num_layers) for layer in wanted}))


def _sorted_layer_ids(_: object, __: attrs.Attribute[Any], value: tuple[int, ...] | None) -> None:
    if value is None:
        return
    if not value or min(value) < 0 or sorted(set(value)) != list(value):
        raise ValueError(f"must be sorted, distinct layer ids from 0, got {list(value)}")


@attrs.frozen(kw_only=True, slots=False)
class VerifierConfig:
    """The verifier that a speculator drafts for; vLLM loads model and tokenizer from `name_or_path`."""

    name_or_path: str
    architectures: tuple[str, ...] = ()


@attrs.frozen(kw_only=True, slots=False)
class ProposalConfig:
    """How a server should draft.

    Attributes:
        speculative_tokens: tokens drafted a round (K).
    """

    proposal_type: str = "greedy"
    speculative_tokens: int = attrs.field(default=3, validator=positive)
    verifier_accept_k: int = 1
    accept_tolerance: float = 0.0


def _some(_: object, __: attrs.Attribute[Any], value: tuple[Any, ...]) -> None:
    if not value:
        raise ValueError("must have one at least: it says how many tokens are drafted a round (speculative_tokens)")


@attrs.frozen(kw_only=True, slots=False)
class SpeculatorsConfig:
    """The `speculators_config` table of config.json: algorithm, proposal methods, verifier."""

    algorithm: str
    default_proposal_method: str = "greedy"
    proposal_methods: tuple[ProposalConfig, ...] = attrs.field(default=(ProposalConfig(),), validator=_some)
    verifier: VerifierConfig


@attrs.frozen(kw_only=True, slots=False)
class SpeculatorModelConfig:
    """Base of every algorithm's config; subclasses add annotated fields with defaults.

    A plain field is both a key of `[algorithm]` and written to config.json; `knob()` fields are only the former,
    `derived()` fields only the latter.

    Attributes:
        draft_vocab_size: tokens that can be drafted (D); None is the verifier's whole vocabulary.
        num_layers: decoder layers of the draft model.
        target_layer_ids: verifier layers whose states are read: id l is the residual stream entering layer l, id N the
            last layer's output before the final norm. None takes [2, N//2, N-3], made distinct.
        decoder: keys that replace those inherited from the verifier in `transformer_layer_config`
            (`model_type`, `intermediate_size`, `sliding_window`, ...).
        init_from: folder of a saved speculator whose weights and draft vocabulary training starts from; None starts
            from chance. Its content, not its path, enters the fingerprint.
    """

    # The kind of the draft's layers where a recipe does not say one in `decoder`.
    decoder_type: ClassVar[str] = "llama"
    # Fields that a model takes over from the checkpoint that it starts from, where the recipe does not say them.
    taken_over: ClassVar[tuple[str, ...]] = ()
    # Derived fields that a saved config.json has to say, since no default of theirs is any draft's.
    must_say: ClassVar[tuple[str, ...]] = ()
    # Options of other trainers' files that drafts here do not have: passed over where off; the reason to refuse one on.
    others: ClassVar[Mapping[str, str]] = {}
    # Fields of config.json that a model may have otherwise than the checkpoint: its weights mean the same.
    changeable: ClassVar[tuple[str, ...]] = ()
    # Those of them that only decoding reads: a benchmark may try others without training.
    decoding: ClassVar[tuple[str, ...]] = ()
    speculators_model_type: str = derived("")
    architectures: tuple[str, ...] = derived(())
    speculators_version: str = derived(LAYOUT_VERSION)
    speculators_config: SpeculatorsConfig | None = derived(None)
    transformer_layer_config: dict[str, Any] = derived(factory=dict)
    tie_word_embeddings: bool = derived(False)
    draft_vocab_size: int | None = attrs.field(default=None, validator=positive)
    num_layers: int = knob(1, validator=few)
    target_layer_ids: tuple[int, ...] | None = knob(None, validator=_sorted_layer_ids)
    decoder: dict[str, Any] = knob(factory=dict)
    init_from: str | None = knob(None)

    @classmethod
    def register(cls, name: str) -> Callable[[C], C]:
        """Class decorator that registers a config under `name`; applies attrs where the class is bare.

        Raises:
            RegistryError: the name is taken, or differs from the class's `speculators_model_type`.
        """

        def decorate(config_class: C) -> C:
            refuse_built_in(name, config_class)
            if "__attrs_attrs__" not in config_class.__dict__:
                config_class = attrs.frozen(kw_only=True, slots=False)(config_class)
            fields = {field.name: field for field in attrs.fields(config_class)}
            told = fields["speculators_model_type"].default
            if told != name:
                raise RegistryError(
                    f"{config_class.__qualname__} is registered as {name!r} but its speculators_model_type is {told!r}",
                    hint=f'write speculators_model_type: str = "{name}"',
                )
            missing = [field.name for field in fields.values() if field.default is attrs.NOTHING]
            if missing:
                raise RegistryError(
                    f"{config_class.__qualname__}: no default for {', '.join(missing)}",
                    hint="every field of an algorithm's config needs a default: it is what a recipe may leave out",
                )
            return CONFIGS.add(name, config_class)

        return decorate

    @classmethod
    def get_class(cls, name: str) -> type[SpeculatorModelConfig]:
        """Returns the config class of algorithm `name`, importing its folder on first look-up."""
        return CONFIGS.get(name)

    @classmethod
    def recipe_fields(cls) -> tuple[attrs.Attribute[Any], ...]:
        """Returns the fields that are keys of `[algorithm]`."""
        own_type = "speculators_model_type"
        return tuple(f for f in attrs.fields(cls) if not f.metadata.get("derived") and f.name != own_type)

    def layer_ids(self, num_layers: int) -> tuple[int, ...]:
        """Returns the ids of the states that are read of a verifier of `num_layers`; the hook of an own default."""
        return self.target_layer_ids or default_layer_ids(num_layers)

    def max_drafts(self) -> tuple[int, str] | None:
        """Returns the most tokens that are drafted a round (K), and the field that sets it; None without a limit."""
        return None

    def misfits(self, facts: VerifierFacts) -> Iterator[tuple[str, str, str]]:
        """Yields what cannot be with this verifier: field, what is wrong with it, what to do; a hook to add to."""
        token = getattr(self, "mask_token_id", None)
        if token is not None and token >= facts.vocab_size:
            message = f"must be a token of the verifier, 0 to {facts.vocab_size - 1}, got {token}"
            yield "mask_token_id", message, "leave it out for the last"

    @classmethod
    def refusals(cls, raw: Mapping[str, Any]) -> list[str]:
        """Returns which of `others` are on in a config.json, each with the reason that no such draft is read."""
        on = {key: raw[key] for key in cls.others if raw.get(key) not in (None, False)}
        return [f"{key} = {value!r}: {cls.others[key]}" for key, value in on.items()]

    @classmethod
    def pick(cls, kwargs: Mapping[str, Any]) -> Any:
        """Builds the config from training kwargs: takes the names it has, leaves the others."""
        names = {field.name for field in attrs.fields(cls)}
        return cls(**{name: value for name, value in kwargs.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """Returns config.json as a dict of JSON values."""
        return attrs.asdict(self, filter=lambda f, _: not f.metadata.get("knob"), value_serializer=_jsonable)

    def save(self, folder: Path) -> None:
        """Writes `folder/config.json`."""
        (folder / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def refuse_built_in(name: str, thing: type) -> None:
    """Raises RegistryError where `thing`, which is not of this package, takes the name of one of its algorithms."""
    if name in _folders() and not f"{thing.__module__}.".startswith(f"speculators.models.{name}."):
        message = f"{thing.__module__}.{thing.__qualname__} is registered as {name!r}, an algorithm of speculators"
        raise RegistryError(message, hint="take another name")


def _jsonable(_: object, __: object, value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _folders() -> list[str]:
    """Returns the names of our own algorithms."""
    from speculators import models

    return [module.name for module in pkgutil.iter_modules(models.__path__) if module.ispkg]


def _discover() -> list[str]:
    folders, points = _folders(), _entry_points()
    if twice := sorted(set(folders) & points.keys()):
        told = ", ".join(f"{name!r} ({points[name].value})" for name in twice)
        raise RegistryError(f"an installed package calls its algorithm as one of speculators: {told}", hint="rename it")
    return [*folders, *points]


def _find(name: str) -> None:
    """Imports the folder of algorithm `name`: one of ours, or one that an entry point names."""
    # Ours first, without asking what is installed: that takes a tenth of a second, and `_discover` tells of a clash.
    if name in _folders():
        importlib.import_module(f"speculators.models.{name}.config")
    elif point := _entry_points().get(name):
        point.load()


def _entry_points() -> dict[str, Any]:
    # Late: it brings the standard library's e-mail parser along.
    from importlib import metadata

    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}


CONFIGS: Registry[Any] = Registry("algorithm", find=_find, discover=_discover)
