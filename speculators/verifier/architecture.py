"""Builds a verifier's architecture from its config.json, without weights, and finds its parts by structure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from speculators.errors import VerifierError
from speculators.facts import VerifierFacts, reason
from speculators.verifier.quiet import quiet
from speculators.verifier.trust import is_trusted

_TRUST_HINT = "it comes with code of its own: if you trust that code, set verifier.trust_remote_code = true"
# Keys that say that several residual streams run side by side: there is no one state of a layer to read.
_PARALLEL_STREAMS = ("altup_num_inputs", "hc_mult")


@attrs.frozen(eq=False)
class Skeleton:
    """A verifier's architecture from tensors without storage.

    Attributes:
        config: transformers' config of the whole model.
        text: of its language model; the same object unless it is multimodal.
        model: the whole model.
    """

    config: Any
    text: Any
    model: Any

    @classmethod
    def of(cls, facts: VerifierFacts) -> Skeleton:
        """Builds the architecture; raises VerifierError if transformers cannot, or if its states cannot be read."""
        config = config_of(facts)
        try:
            with quiet(), torch.device("meta"):
                text = config.get_text_config(decoder=True)
                model = auto_class(config).from_config(config, trust_remote_code=is_trusted(_folder(facts)))
        except VerifierError as error:
            raise VerifierError(f"{facts.source}: {error}") from error
        # transformers validates with many classes of errors, and a model's own code may raise any.
        except Exception as error:
            raise VerifierError(f"{facts.source}: transformers cannot build this model: {reason(error)}") from error
        return cls(config, text, model)


def config_of(facts: VerifierFacts) -> Any:
    """Makes transformers' config of a verifier, with the defaults of its class.

    Raises:
        VerifierError: transformers does not know the model's type, or rejects a value; the message names the key.
    """
    if facts.get("auto_map") and is_trusted(_folder(facts)):
        try:
            with quiet():
                return AutoConfig.from_pretrained(_folder(facts), local_files_only=True, trust_remote_code=True)
        # A model's own code may raise anything.
        except Exception as error:
            raise VerifierError(f"{facts.source}: the model's own code rejects it: {reason(error)}") from error
    try:
        return facts.class_config()
    except KeyError:
        hint = _TRUST_HINT if facts.get("auto_map") else "a newer transformers may know it"
        kind = facts.to_dict().get("model_type")
        known = f"transformers {transformers.__version__} does not know the model_type {kind!r}"
        raise VerifierError(f"{facts.source}: {known}", hint=hint) from None


def auto_class(config: Any) -> Any:
    """Chooses transformers' class for a model that writes text; raises VerifierError if this config has none."""
    for choice in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in choice._model_mapping or choice.__name__ in (getattr(config, "auto_map", None) or {}):
            return choice
    raise VerifierError(f"a {config.model_type} is not a language model: transformers has no class that writes text")


def trunk(model: Any) -> nn.Module:
    """Finds the module that holds the embeddings, the decoder layers and the final norm, whatever wraps it.

    Raises:
        VerifierError: the architecture has no such module.
    """
    modules: Iterator[nn.Module] = model.get_decoder().modules()
    for module in modules:
        if _layers_of(module) is not None and _embeds(module):
            return module
    raise VerifierError(f"{type(model).__name__} has no list of decoder layers to capture from")


def decoder_layers(model: Any) -> nn.ModuleList:
    """Finds the decoder layers of a transformers model; raises VerifierError if the architecture has no such list."""
    layers = _layers_of(trunk(model))
    assert layers is not None, "a trunk has layers"
    return layers


def final_norm(model: Any, size: int) -> tuple[str, nn.Module]:
    """Finds the norm that follows the last decoder layer.

    Args:
        size: of a hidden state.

    Returns:
        Its name in the trunk, and the module.

    Raises:
        VerifierError: there is none, or one without a weight.
    """
    base = trunk(model)
    norms = [(name, module) for name, module in base.named_children() if _is_norm(module, size)]
    named = [pair for pair in norms if pair[0] == "norm"]
    if not norms:
        raise VerifierError(f"{type(base).__name__} has no final norm with a weight")
    # The norm of embeddings is made before the layers, the final one after them.
    return (named or norms)[-1]


def parallel_streams(text: Any) -> str:
    """Names the key by which a model says that it has several residual streams; "" if it has one."""
    return next((key for key in _PARALLEL_STREAMS if (getattr(text, key, None) or 1) > 1), "")


def _folder(facts: VerifierFacts) -> Path:
    return Path(facts.source).parent


def _layers_of(module: nn.Module) -> nn.ModuleList | None:
    """The one list of blocks that a module has, by any name."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child)]
    blocks = [each for each in lists if sum(1 for _ in each[0].parameters()) > 1]
    return blocks[0] if len(blocks) == 1 else None


def _embeds(module: nn.Module) -> bool:
    return any(isinstance(child, nn.Embedding) for child in module.children())


def _is_norm(module: nn.Module, size: int) -> bool:
    weights = list(_own(module))
    return bool(weights) and not list(module.children()) and all(weight.shape == (size,) for weight in weights)


def _own(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
