"""The configs of algorithms: keys of `[algorithm]` in a recipe, and a speculator's config.json. No torch here."""

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
from speculators.registry import Registry, near_miss, qualified_name

C = TypeVar("C", bound=type)

ENTRY_POINTS = "speculators.models"

# The version of the layout of config.json and weight names that vLLM reads; not the version of this package.
LAYOUT_VERSION = "0.9.0"

# The losses that speculators.losses registers, listed again so that recipes are checked without torch; a test compares.
LOSSES = ("ce", "jsd", "kl_div", "lk_hybrid", "nla", "rkl", "tv")

# Upper limit on a draft's layers, on tokens drafted per round, and on depths that training unrolls. Published drafts
# have at most 16: a larger number is a mistake, and would fill the memory before it is noticed.
MOST = 64


def derived(default: Any = attrs.NOTHING, **kwargs: Any) -> Any:
    """Declares a config field that the build fills in: written to config.json, never a key of a recipe.

    Example:
        architectures: tuple[str, ...] = derived(("RelayDraftModel",))
    """
    return attrs.field(default=default, metadata={"derived": True}, **kwargs)


def knob(default: Any = attrs.NOTHING, **kwargs: Any) -> Any:
    """Declares a config field that only training reads: a key of `[algorithm]`, never written to config.json.

    Example:
        depths: int = knob(3, validator=positive)
    """
    return attrs.field(default=default, metadata={"knob": True}, **kwargs)


# Metadata of a field that switches on what runs before it did not have. A fingerprint contains the field only where it
# differs from its default, so that those runs keep their fingerprints. The default must never change.
OFF_BY_DEFAULT = {"off_by_default": True}


def option(default: Any, **kwargs: Any) -> Any:
    """Declares a `knob` that is off by default and leaves no trace in a fingerprint while it is off.

    Example:
        state_dropout: float = option(0.0, validator=not_negative)
    """
    return attrs.field(default=default, metadata={"knob": True, **OFF_BY_DEFAULT}, **kwargs)


def is_off(field: attrs.Attribute[Any], value: Any) -> bool:
    """Whether `value` leaves the field of an option at its default."""
    return field.metadata.get("off_by_default", False) and value == field.default


def positive(_: object, __: attrs.Attribute[Any], value: Any) -> None:
    """attrs validator: None, or a number > 0."""
    if value is not None and value <= 0:
        raise ValueError(f"must be > 0, got {value!r}")


def few(_: object, __: attrs.Attribute[Any], value: int) -> None:
    """attrs validator: 1 <= value <= MOST."""
    positive(_, __, value)
    if value > MOST:
        raise ValueError(f"must be at most {MOST}, got {value}")


def known_losses(_: object, __: attrs.Attribute[Any], value: dict[str, float]) -> None:
    """attrs validator: weights >= 0 of registered losses, at least one of them > 0."""
    for name in value:
        if name not in LOSSES:
            hint = near_miss(name, list(LOSSES))
            raise ValueError(f"no loss {name!r}; available: {', '.join(LOSSES)}{f'; {hint}' if hint else ''}")
    if not value or min(value.values()) < 0 or sum(value.values()) <= 0:
        raise ValueError(f"must give at least one loss a weight > 0 and none a weight below 0, got {value}")


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """The verifier layers that are read by default: (2, N//2, N-3), for N < 7 the nearest distinct ids in 0..N.

    Args:
        num_layers: layers of the verifier (N).
    """
    middle = num_layers // 2
    ids = {min(2, middle - 1), middle, max(num_layers - 3, middle + 1)}
    return tuple(sorted({min(max(layer, 0), num_layers) for layer in ids}))


def _sorted_layer_ids(_: object, __: attrs.Attribute[Any], value: tuple[int, ...] | None) -> None:
    if value is None:
        return
    if not value or min(value) < 0 or sorted(set(value)) != list(value):
        raise ValueError(f"must be sorted, distinct layer ids from 0, got {list(value)}")


@attrs.frozen(kw_only=True, slots=False)
class VerifierConfig:
    """The verifier that a speculator drafts for, as config.json names it.

    Attributes:
        name_or_path: where a server loads model and tokenizer from.
        architectures: the class names in the verifier's own config.json.

    Example:
        VerifierConfig(name_or_path="Qwen/Qwen3-8B", architectures=("Qwen3ForCausalLM",))
    """

    name_or_path: str
    architectures: tuple[str, ...] = ()


@attrs.frozen(kw_only=True, slots=False)
class ProposalConfig:
    """How a server should draft.

    Attributes:
        speculative_tokens: tokens drafted per round (K).

    Example:
        ProposalConfig(speculative_tokens=5)
    """

    proposal_type: str = "greedy"
    speculative_tokens: int = attrs.field(default=3, validator=positive)
    verifier_accept_k: int = 1
    accept_tolerance: float = 0.0


def _some(_: object, __: attrs.Attribute[Any], value: tuple[Any, ...]) -> None:
    if not value:
        raise ValueError("must have at least one entry: it sets the tokens drafted per round (speculative_tokens)")


@attrs.frozen(kw_only=True, slots=False)
class SpeculatorsConfig:
    """The `speculators_config` table of config.json: algorithm, proposal methods, verifier.

    Example:
        SpeculatorsConfig(algorithm="myalgo", verifier=VerifierConfig(name_or_path="Qwen/Qwen3-8B"))
    """

    algorithm: str
    default_proposal_method: str = "greedy"
    proposal_methods: tuple[ProposalConfig, ...] = attrs.field(default=(ProposalConfig(),), validator=_some)
    verifier: VerifierConfig


@attrs.frozen(kw_only=True, slots=False)
class SpeculatorModelConfig:
    """Base of every algorithm's config; subclasses add annotated fields with defaults.

    A plain field is a key of `[algorithm]` in a recipe and is written to config.json. A `knob()` field is only a key, a
    `derived()` field is only written.

    Attributes:
        draft_vocab_size: tokens that can be drafted (D); None for the verifier's whole vocabulary.
        num_layers: decoder layers of the draft model.
        target_layer_ids: verifier layers whose states are read: id l is the residual stream entering layer l, id N the
            last layer's output before the final norm. None for [2, N//2, N-3], made distinct.
        decoder: keys that replace those inherited from the verifier in `transformer_layer_config`
            (`model_type`, `intermediate_size`, `sliding_window`, ...).
        init_from: folder of a saved speculator whose weights and draft vocabulary training starts from; None starts
            from random weights. Its content, not its path, enters the fingerprint.

    Example:
        @SpeculatorModelConfig.register("myalgo")
        class MyAlgoSpeculatorConfig(SpeculatorModelConfig):
            speculators_model_type: str = "myalgo"
            block_size: int = 8
    """

    # The type of the draft's layers unless a recipe sets `decoder.model_type`.
    decoder_type: ClassVar[str] = "llama"
    # Fields that training from a checkpoint takes from the checkpoint unless the recipe sets them.
    taken_over: ClassVar[tuple[str, ...]] = ()
    # Derived fields that a saved config.json must contain: no default fits every draft.
    must_say: ClassVar[tuple[str, ...]] = ()
    # Options in files of other trainers that drafts here do not have. Ignored where off; where on, the file is refused
    # for the reason given here.
    unsupported: ClassVar[Mapping[str, str]] = {}
    # Fields that may differ from the checkpoint that training starts from: its weights mean the same with any value.
    changeable: ClassVar[tuple[str, ...]] = ()
    # Those of `changeable` that only decoding reads: a benchmark may try other values without training.
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
            place, model_type = qualified_name(config_class), fields["speculators_model_type"].default
            if model_type != name:
                raise RegistryError(
                    f"{place} is registered as {name!r} but its speculators_model_type is {model_type!r}",
                    hint=f'write speculators_model_type: str = "{name}"',
                )
            missing = [field.name for field in fields.values() if field.default is attrs.NOTHING]
            if missing:
                raise RegistryError(
                    f"{place}: no default for {', '.join(missing)}",
                    hint="give every field of an algorithm's config a default: a recipe may leave any of them out",
                )
            return CONFIGS.add(name, config_class)

        return decorate

    @classmethod
    def get_class(cls, name: str) -> type[SpeculatorModelConfig]:
        """Looks up the config class of algorithm `name`, importing its folder the first time."""
        return CONFIGS.get(name)

    @classmethod
    def recipe_fields(cls) -> tuple[attrs.Attribute[Any], ...]:
        """The fields that are keys of `[algorithm]`."""
        own_type = "speculators_model_type"
        return tuple(f for f in attrs.fields(cls) if not f.metadata.get("derived") and f.name != own_type)

    def layer_ids(self, num_layers: int) -> tuple[int, ...]:
        """The verifier states that the draft reads; a hook for algorithms with a default of their own.

        Args:
            num_layers: layers of the verifier (N); id N is the last layer's output.
        """
        return self.target_layer_ids or default_layer_ids(num_layers)

    def max_drafts(self) -> tuple[int, str] | None:
        """The largest number of tokens per round (K), and the field that sets it; None without a limit. A hook."""
        return None

    def misfits(self, facts: VerifierFacts) -> Iterator[tuple[str, str, str]]:
        """Yields the values that do not fit a verifier, each as (field, fault, remedy); a hook to extend."""
        token = getattr(self, "mask_token_id", None)
        if token is not None and token >= facts.vocab_size:
            message = f"must be a token of the verifier, 0 to {facts.vocab_size - 1}, got {token}"
            yield "mask_token_id", message, "leave it out for the last"

    @classmethod
    def refusals(cls, raw: Mapping[str, Any]) -> list[str]:
        """Lists the `unsupported` options that a config.json switches on, each with the reason to refuse it."""
        on = {key: raw[key] for key in cls.unsupported if raw.get(key) not in (None, False)}
        return [f"{key} = {value!r}: {cls.unsupported[key]}" for key, value in on.items()]

    @classmethod
    def pick(cls, kwargs: Mapping[str, Any]) -> Any:
        """Builds the config from training kwargs, ignoring names that it does not have."""
        names = {field.name for field in attrs.fields(cls)}
        return cls(**{name: value for name, value in kwargs.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json: every field but knobs, as JSON values."""
        return attrs.asdict(self, filter=lambda f, _: not f.metadata.get("knob"), value_serializer=_jsonable)

    def save(self, folder: Path) -> None:
        """Writes `folder/config.json`."""
        (folder / "config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def refuse_built_in(name: str, thing: type) -> None:
    """Rejects a plug-in whose name collides with a built-in algorithm, with a RegistryError."""
    if name in _folders() and not f"{thing.__module__}.".startswith(f"speculators.models.{name}."):
        message = f"{qualified_name(thing)} is registered as {name!r}, an algorithm of speculators"
        raise RegistryError(message, hint="choose another name")


def _jsonable(_: object, __: object, value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _folders() -> list[str]:
    """The names of the built-in algorithms: folders of `speculators.models`."""
    from speculators import models

    return [module.name for module in pkgutil.iter_modules(models.__path__) if module.ispkg]


def _discover() -> list[str]:
    folders, points = _folders(), _entry_points()
    if twice := sorted(set(folders) & points.keys()):
        clashes = ", ".join(f"{name!r} ({points[name].value})" for name in twice)
        message = f"an installed package gives its algorithm the name of a built-in one: {clashes}"
        raise RegistryError(message, hint="rename it, or uninstall the package")
    return [*folders, *points]


def _find(name: str) -> None:
    """Imports the folder of algorithm `name`: a built-in one, or one that an entry point names."""
    # Built-in ones first: listing installed packages takes a tenth of a second, and `_discover` reports clashes.
    if name in _folders():
        importlib.import_module(f"speculators.models.{name}.config")
    elif point := _entry_points().get(name):
        point.load()


def _entry_points() -> dict[str, Any]:
    # Imported here because it loads the standard library's e-mail parser.
    from importlib import metadata

    return {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}


CONFIGS: Registry[Any] = Registry("algorithm", find=_find, discover=_discover)
