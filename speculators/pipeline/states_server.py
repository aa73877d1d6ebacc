"""`spec serve-states`: a vLLM server that gives a recipe's states, in the foreground until it is stopped."""

from __future__ import annotations

import os
import shutil
from typing import Any
from urllib.parse import urlsplit

import attrs
import torch

from speculators.errors import ServerError
from speculators.events import Progress
from speculators.nn.precision import compute_dtype
from speculators.pipeline.server_capture import prepare_folder, serving_note, shared_folder
from speculators.recipe.plan import make_plan
from speculators.recipe.schema import Recipe
from speculators.runs.places import Places
from speculators.servers.process import run_until_stopped
from speculators.servers.states_command import ServeStates
from speculators.verifier.sources import fetch_facts, obtain

# Of URLs that name none.
_PORTS = {"http": 80, "https": 443}


@attrs.frozen(kw_only=True)
class Where:
    """How the server is started, which no recipe says.

    Attributes:
        host, port: where it listens; None for those of the recipe's `data.server.endpoint`.
        vllm: the program, by path or name.
        extra: further arguments of `vllm serve`.
    """

    host: str | None = None
    port: int | None = None
    vllm: str = "vllm"
    extra: tuple[str, ...] = ()


def planned(recipe: Recipe, where: Where, *, places: Places, progress: Progress) -> tuple[ServeStates, dict[str, Any]]:
    """Returns what a recipe's server is started with, and the note of it that capture looks for.

    Of a hub's model only config.json is fetched here.
    """
    section = recipe.verifier
    hub = section.kind == "hub"
    facts = fetch_facts(section, cache=places.verifiers, progress=progress)
    model = section.model if hub else str(obtain(section, cache=places.verifiers, progress=progress).absolute())
    plan = make_plan(recipe, facts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(getattr(torch, recipe.data.states_dtype), torch.device(device))
    # Where capture will ask: a server elsewhere would never be found.
    asked = urlsplit(recipe.data.server.endpoint)
    settings = ServeStates(
        model=model,
        name=section.model,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        layer_ids=plan.target_layer_ids,
        num_layers=facts.num_hidden_layers,
        dtype=str(dtype).removeprefix("torch."),
        # A conversation that fills all positions leaves none to answer: capture tells so, if there is one.
        max_model_len=min(recipe.data.max_tokens + 1, facts.max_position_embeddings),
        folder=shared_folder(plan, places).absolute(),
        device=device,
        host=where.host or str(asked.hostname),
        port=where.port or asked.port or _PORTS[asked.scheme],
        vllm=where.vllm,
        extra=where.extra,
    )
    return settings, serving_note(plan)


def serve_states(settings: ServeStates, note: dict[str, Any]) -> int:
    """Runs the server until it ends or is stopped; returns its exit code.

    Raises:
        ServerError: there is no such program.
        KeyboardInterrupt: it was stopped by Ctrl-C, or by SIGTERM; it is gone then.
    """
    program = shutil.which(settings.vllm)
    if program is None:
        hint = "vLLM has an environment of its own: name its program, --vllm /path/to/environment/bin/vllm"
        raise ServerError(f"{settings.vllm}: no such program", hint=hint)
    prepare_folder(settings.folder, note)
    command = attrs.evolve(settings, vllm=program).command()
    return run_until_stopped(command, {**os.environ, **settings.environment(os.environ)})
