"""How servers read speculators: an algorithm's `layouts.py` lists the layouts, `spec export` writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from speculators.facts import VerifierFacts
from speculators.formats.names import TensorNames
from speculators.recipe.input_sections import VerifierSection

VLLM, SGLANG = "vllm", "sglang"
# Names of the servers in messages.
SERVERS = {VLLM: "vLLM", SGLANG: "SGLang"}
# Key of vLLM's --speculative-config: a list of [first batch size, last, K], from batch size 1, K = 0 drafts nothing.
# Larger batches keep the last K (vLLM's guide "Dynamic Speculative Decoding"; pull request 32374 first took a dict of
# "first-last" to K, which its validation now refuses).
PER_BATCH = "num_speculative_tokens_per_batch_size"
# Values of `spec export --to`, and the server whose layout each one writes.
TARGETS = {"vllm": VLLM, "sglang": SGLANG, "speculators": VLLM, "hub": VLLM}


@attrs.frozen(kw_only=True)
class Deployment:
    """What the command that serves an export has to name.

    Attributes:
        folder: of the export, or its hub id.
        verifier: its folder or hub id.
        num_speculative_tokens: K.
        schedule: (first batch size, last, K) of each range of batch sizes; () for one K.
    """

    folder: str
    verifier: str
    num_speculative_tokens: int
    schedule: tuple[tuple[int, int, int], ...] = ()


def vllm_serve(deployment: Deployment) -> tuple[str, ...]:
    """Builds the command for a folder whose config.json names algorithm, verifier and K, where vLLM reads them."""
    return ("vllm", "serve", deployment.folder)


def vllm_draft(method: str) -> Callable[[Deployment], tuple[str, ...]]:
    """Makes a command builder for a draft that vLLM loads beside the verifier, by `--speculative-config`."""

    def command(deployment: Deployment) -> tuple[str, ...]:
        options: dict[str, Any] = {
            "method": method,
            "model": deployment.folder,
            "num_speculative_tokens": deployment.num_speculative_tokens,
        }
        if deployment.schedule:
            options[PER_BATCH] = [list(each) for each in deployment.schedule]
        return ("vllm", "serve", deployment.verifier, "--speculative-config", json.dumps(options))

    return command


def sglang_draft(algorithm: str) -> Callable[[Deployment], tuple[str, ...]]:
    """Makes a command builder for SGLang, drafting a chain (`topk` 1) of K tokens."""

    def command(deployment: Deployment) -> tuple[str, ...]:
        k = deployment.num_speculative_tokens
        options = {
            "model-path": deployment.verifier,
            "speculative-algorithm": algorithm,
            "speculative-draft-model-path": deployment.folder,
            "speculative-num-steps": str(k),
            "speculative-eagle-topk": "1",
            # SGLang counts the verifier's own token among those it verifies.
            "speculative-num-draft-tokens": str(k + 1),
        }
        arguments = (part for name, value in options.items() for part in (f"--{name}", value))
        return ("python", "-m", "sglang.launch_server", *arguments)

    return command


def chat_arguments(server: str, section: VerifierSection | None) -> tuple[str, ...]:
    """Builds the arguments with which a server renders conversations as training did; () for the model's own way.

    SGLang has no default for arguments of the template: each request carries them.
    """
    if section is None:
        return ()
    file = () if section.chat_template is None else ("--chat-template", section.chat_template)
    stated = section.template and server == VLLM
    return (*file, *(("--default-chat-template-kwargs", json.dumps(section.template)) if stated else ()))


def chat_notes(server: str, section: VerifierSection | None) -> list[str]:
    """Lists what users of an export must know of the chat template that the draft was trained with."""
    notes = []
    if section is not None and section.chat_template is not None:
        notes.append(f"the draft was trained with the chat template {section.chat_template}: a server needs the file")
        if server == SGLANG and not section.chat_template.endswith(".jinja"):
            notes.append("SGLang reads a Jinja template only from a file whose name ends with .jinja: copy it")
    if section is not None and section.template and server == SGLANG:
        arguments = json.dumps({"chat_template_kwargs": section.template})
        notes.append(f"the draft was trained with arguments of the chat template: each request must carry {arguments}")
    return notes


def _nothing(_: Any) -> list[str]:
    return []


def _unchanged(config: Any, _: VerifierFacts) -> Any:
    return config


@attrs.frozen(kw_only=True)
class ServerLayout:
    """How one server reads the speculators of one algorithm.

    Attributes:
        server: VLLM or SGLANG.
        command: builds the command that serves an export.
        with_k: builds a command that states K, where `command` leaves it to config.json; None where `command` does, or
            where only config.json can.
        names: of the tensors; None for ours.
        from_verifier: prefixes of our names. The server takes these tensors from the verifier; they are not written.
        config: converts our config into the server's config.json (a dict of JSON values); None writes ours.
        refusals: lists the options of a config that the server would get wrong, each with the reason and the remedy.
        notes: lists what users of the export should know.
        as_trained: fills in what training makes of a recipe's config beyond its decoder, from the verifier's facts.
        stitch: writes the whole export (speculator's folder, verifier's folder, new folder) where the draft becomes
            part of a copy of the verifier; None where the export has a folder of its own.
    """

    server: str
    command: Callable[[Deployment], tuple[str, ...]]
    with_k: Callable[[Deployment], tuple[str, ...]] | None = None
    names: TensorNames | None = None
    from_verifier: tuple[str, ...] = ()
    config: Callable[[Any], dict[str, Any]] | None = None
    refusals: Callable[[Any], list[str]] = _nothing
    notes: Callable[[Any], list[str]] = _nothing
    as_trained: Callable[[Any, VerifierFacts], Any] = _unchanged
    stitch: Callable[[Path, Path, Path], Path] | None = None


def activation_refusals(config: Any) -> list[str]:
    """Refuses activations that the feed-forward layers of servers lack: vLLM's and SGLang's have SiLU only."""
    name = config.transformer_layer_config["hidden_act"]
    if name == "silu":
        return []
    return [f'hidden_act {name!r}: servers\' layers have SiLU only; train with algorithm.decoder.hidden_act = "silu"']


def flat_decoder(decoder: dict[str, Any]) -> dict[str, Any]:
    """Flattens `transformer_layer_config` to the top level of a config.json, with the older rotary keys.

    Servers on transformers 4 read `rope_theta` and `rope_scaling`; transformers 5 turns them into `rope_parameters`.
    """
    rope = dict(decoder["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = rope if rope.get("rope_type", "default") != "default" else None
    plain = {key: value for key, value in decoder.items() if key not in ("rope_parameters", "layer_types")}
    return {**plain, "rope_theta": theta, "rope_scaling": scaling}
