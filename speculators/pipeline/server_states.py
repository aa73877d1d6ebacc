"""Hidden states from vLLM servers: the server that `spec serve-states` starts, and capture through such servers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import attrs
import torch

from speculators.data.capture import StateWriter, fill_stream
from speculators.data.encoded import Conversations
from speculators.data.streamed import WINDOW, StreamedStates
from speculators.errors import DataError, ServerError
from speculators.events import Progress, StatesCheckFacts, WarningEvent
from speculators.files.disk import disk_errors, read_json, write_json
from speculators.nn.precision import compute_dtype
from speculators.pipeline.context import Context
from speculators.recipe.fingerprint import fingerprint
from speculators.recipe.plan import Plan, make_plan
from speculators.recipe.schema import Recipe
from speculators.runs.places import Places
from speculators.servers.endpoint import Endpoint, Retry
from speculators.servers.engines import ServerIdentity
from speculators.servers.states_client import START_HINT, StatesClient
from speculators.servers.states_pool import StatesPool
from speculators.servers.states_server import StatesServer, run_until_stopped
from speculators.training.world import local_device
from speculators.verifier.sources import config_facts, obtain
from speculators.verifier.states_check import StatesCheck, compare_states

# Lies beside the states that the server writes, and says what `spec serve-states` started it with.
NOTE = "serving.json"


# Lies in the store, and says which engine computed it.
PROVENANCE = "served.json"


# Conversations that are compared before the others are requested: the shortest of at least that many tokens.
SAMPLE, SAMPLE_TOKENS = 4, 16


def serving_note(plan: Plan) -> dict[str, Any]:
    """States what a server must have been started with, as JSON values."""
    return {
        "verifier": plan.stage("verifier").fingerprint,
        "layer_ids": list(plan.target_layer_ids),
        "states_dtype": plan.recipe.data.capture_dtype,
    }


def shared_folder(plan: Plan, places: Places) -> Path:
    """Finds the folder in which the server leaves states: the recipe's, or one for servers of these states alone."""
    folder = plan.recipe.data.server.folder
    return Path(folder) if folder is not None else places.from_server(fingerprint(serving_note(plan)))


def states_pool(context: Context, prepared: Conversations | None = None) -> tuple[StatesPool, ServerIdentity]:
    """Connects to the recipe's servers and checks that they leave the right states in the folder.

    Args:
        prepared: the conversations, which messages name; None if the suite's responses are captured.

    Returns:
        The servers that answer, and what they say about themselves; `max_model_len` is the smallest of theirs.

    Raises:
        ServerError: no server can be reached.
        DataError: no server writes into the folder, or the one that does was started for other states.
    """
    folder = shared_folder(context.plan, context.places)
    served = _reachable(context)
    _check_folder(context.plan, folder)
    clients = [_client(context, endpoint, identity, folder) for endpoint, identity in served.items()]
    # Otherwise the first requests of all processes would go to the same server.
    first = context.world.rank % len(clients)
    pool = StatesPool(
        clients=clients[first:] + clients[:first],
        name=lambda index: f"{index} of the suite" if prepared is None else prepared.ids()[index],
        report=context.warn_later,
    )
    lengths = [each.max_model_len for each in served.values() if each.max_model_len is not None]
    return pool, attrs.evolve(next(iter(served.values())), max_model_len=min(lengths, default=None))


def _reachable(context: Context) -> dict[Endpoint, ServerIdentity]:
    """Asks each server what it is; leaves out those that do not answer, unless none does."""
    section, stop = context.recipe.data.server, Event()
    served, failures = {}, []
    for url in section.endpoints:
        endpoint = Endpoint(url=url, timeout=section.timeout, retry=Retry(times=section.retries), stop=stop)
        try:
            served[endpoint] = ServerIdentity.at(endpoint)
        except ServerError as error:
            failures.append(error)
    if not served:
        raise failures[0]
    for failure in failures:
        context.emit(WarningEvent(message=f"{failure.message}: this server is left out of this launch"))
    engines = {f"{each.engine} {each.version} with {each.model}": url for url, each in served.items()}
    if len(engines) > 1:
        differing = ", ".join(f"{endpoint.url} runs {engine}" for engine, endpoint in engines.items())
        context.emit(WarningEvent(message=f"the servers differ, and so may the last bits of their states: {differing}"))
    return served


def _check_folder(plan: Plan, folder: Path) -> None:
    """Raises DataError unless a server of the plan's states writes into the folder."""
    if not folder.is_dir():
        hint = f"start the server with this folder, or set data.server.folder to the server's own; {START_HINT}"
        raise DataError(f"{folder}: no such folder: no server of these states writes here", hint=hint)
    required, noted = serving_note(plan), read_json(folder / NOTE)
    if isinstance(noted, dict) and noted != required:
        differences = ", ".join(
            f"{key} {noted.get(key)} instead of {value}" for key, value in required.items() if noted.get(key) != value
        )
        raise DataError(f"{folder}: the server there was started for different states: {differences}", hint=START_HINT)


def _client(context: Context, endpoint: Endpoint, served: ServerIdentity, folder: Path) -> StatesClient:
    plan = context.plan
    return StatesClient(
        endpoint=endpoint,
        model=served.model,
        folder=folder,
        layer_ids=plan.target_layer_ids,
        num_layers=plan.facts.num_hidden_layers,
        hidden_size=plan.facts.hidden_size,
        dtype=getattr(torch, context.recipe.data.capture_dtype),
    )


def fill_from_server(context: Context, writer: StateWriter, prepared: Conversations) -> str:
    """Captures what the store lacks; returns engine and version of the server.

    Raises:
        DataError: a conversation is too long for the server, or the states are not the verifier's.
    """
    world = context.world
    pool, served = states_pool(context, prepared)
    _check_length(prepared, served)
    if world.is_main:
        _keep_provenance(context, writer, served)
        _clear(context)
    if writer.missing():
        _compare_first(context, pool, prepared)
    world.barrier()
    stream = partial(pool.capture_all, concurrency=context.recipe.data.server.requests_at_once(world.size))
    fill_stream(writer, prepared, stream, rank=world.rank, world_size=world.size, progress=context.emit)
    return _engine_name(served)


def streamed_states(context: Context, prepared: Conversations) -> StreamedStates:
    """Connects training to servers that compute the states meanwhile; every process calls this.

    Raises:
        DataError: a conversation is too long for the servers, or the states are not the verifier's.
    """
    world, data = context.world, context.recipe.data
    with context.stage("servers") as result:
        pool, served = states_pool(context, prepared)
        _check_length(prepared, served)
        result.detail = f"{_engine_name(served)} at {', '.join(client.endpoint.url for client in pool.clients)}"
    if world.is_main:
        _clear(context)
    _compare_first(context, pool, prepared)
    world.barrier()
    concurrency = data.server.requests_at_once(world.size)
    return StreamedStates(
        conversations=prepared,
        stream=partial(pool.capture_all, concurrency=concurrency),
        cancel=pool.cancel,
        dtype=data.states_dtype,
        window=WINDOW * concurrency,
    )


def _engine_name(served: ServerIdentity) -> str:
    return f"{served.engine or 'a server'} {served.version}".rstrip()


def _check_length(prepared: Conversations, served: ServerIdentity) -> None:
    longest = int(prepared.lengths.max())
    if served.max_model_len is not None and longest >= served.max_model_len:
        limit = f"the server takes {served.max_model_len} tokens, one of them to answer"
        message = f"{limit}; the longest conversation has {longest}"
        raise DataError(message, hint="start the server with a larger --max-model-len")


def _keep_provenance(context: Context, writer: StateWriter, served: ServerIdentity) -> None:
    file, facts = writer.folder / PROVENANCE, attrs.asdict(served)
    earlier = read_json(file)
    if isinstance(earlier, dict) and earlier != facts and len(writer.missing()) < len(writer.layout.shards):
        before, now = (f"{one.get('engine')} {one.get('version')} with {one.get('root')}" for one in (earlier, facts))
        mixture = f"{writer.folder}: a part was captured by {before}, the rest is captured by {now}"
        context.emit(WarningEvent(message=f"{mixture}; spec data --check-states compares both with the verifier"))
    write_json(file, facts)


def _clear(context: Context) -> None:
    """Removes states that a killed launch requested, unless the recipe names a folder: others may use it.

    Another run may use the same servers. Its files are younger than the time that a conversation may take.
    """
    server = context.recipe.data.server
    if server.folder is not None:
        return
    for pattern in ("*.safetensors", "*.safetensors.lock"):
        for file in shared_folder(context.plan, context.places).glob(pattern):
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > server.timeout:
                    file.unlink()


def _compare_first(context: Context, pool: StatesPool, prepared: Conversations) -> None:
    """Compares a few conversations if evaluation loads the verifier anyway; otherwise says how to compare them."""
    if not context.recipe.measures_itself:
        reason = "the server's states are not compared with the verifier's, which does not evaluate in this process"
        remedy = "spec data RECIPE --check-states compares them on a machine that the verifier fits"
        context.emit(WarningEvent(message=f"{reason}: {remedy}"))
        return
    by_length = sorted(range(len(prepared)), key=lambda index: int(prepared.lengths[index]))
    long_enough = [index for index in by_length if prepared.lengths[index] >= SAMPLE_TOKENS] or by_length
    with context.stage("check states") as result, context.lead(context.recipe.data.capture_dtype) as engine:
        if engine is not None:
            check = compare_sample(context, pool, prepared, long_enough[:SAMPLE])
            if check.problems:
                raise DataError(f"{check.source}: {'; '.join(check.problems)}", hint=check.advice)
            error = max(layer.error for layer in check.layers)
            result.facts = StatesCheckFacts(compared_tokens=check.tokens, error=error)
    context.free_engine()


def compare_sample(context: Context, pool: StatesPool, prepared: Conversations, indices: Sequence[int]) -> StatesCheck:
    """Requests the states of some conversations from the servers in turn and compares them with the verifier's."""
    rows = [torch.from_numpy(prepared.row(index).input_ids).long() for index in indices]
    captured = [pool.capture(row) for row in rows]
    source = ", ".join(client.endpoint.url for client in pool.clients)
    dtype = context.recipe.data.capture_dtype
    return compare_with_verifier(context, rows, captured, source=source, states_dtype=dtype)


def compare_with_verifier(
    context: Context,
    rows: Sequence[torch.Tensor],
    captured: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    source: str,
    states_dtype: str,
) -> StatesCheck:
    """Compares captured states with those of the verifier in this process.

    Args:
        rows: [S] int64 token ids of each conversation.
        captured: for each conversation auxiliary states [S, A*H] and last states [S, H].
        source: of the captured states, for messages.
        states_dtype: what they were rounded to.
    """
    engine = context.engine(context.recipe.data.capture_dtype)
    layers, tokens = compare_states(engine, rows, captured, context.plan.target_layer_ids)
    return StatesCheck(
        source=source,
        dtype=str(engine.dtype).removeprefix("torch."),
        states_dtype=states_dtype,
        conversations=len(rows),
        tokens=tokens,
        layers=layers,
    )


def prepare_folder(folder: Path, note: dict[str, Any]) -> None:
    """Makes the folder for states and notes in it what the server is started with."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NOTE, note)


# Default ports.
_PORTS = {"http": 80, "https": 443}


def plan_server(
    recipe: Recipe,
    *,
    places: Places,
    progress: Progress,
    host: str | None = None,
    port: int | None = None,
    vllm: str = "vllm",
    extra: tuple[str, ...] = (),
) -> tuple[StatesServer, dict[str, Any]]:
    """Plans how to start a recipe's server, and the note about it that capture looks for.

    Fetches only config.json of a hub's model; the server fetches the rest itself.

    Args:
        host, port: where it listens; None for those of the first of the recipe's `data.server.endpoints`.
        vllm: the program, by path or name.
        extra: further arguments of `vllm serve`.
    """
    section = recipe.verifier
    hub = section.kind == "hub"
    facts = config_facts(section, cache=places.verifiers, progress=progress)
    model = section.model if hub else str(obtain(section, cache=places.verifiers, progress=progress).absolute())
    plan = make_plan(recipe, facts)
    device = local_device()
    dtype = compute_dtype(getattr(torch, recipe.data.capture_dtype), device)
    # Capture connects to this address: a server elsewhere would never be found.
    address = urlsplit(recipe.data.server.endpoints[0])
    settings = StatesServer(
        model=model,
        name=section.model,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        layer_ids=plan.target_layer_ids,
        num_layers=facts.num_hidden_layers,
        dtype=str(dtype).removeprefix("torch."),
        # A conversation that fills all positions leaves none to answer: capture reports it, if there is one.
        max_model_len=min(_longest(recipe) + 1, facts.max_position_embeddings),
        folder=shared_folder(plan, places).absolute(),
        device=device.type,
        host=host or str(address.hostname),
        port=port or address.port or _PORTS[address.scheme],
        vllm=vllm,
        extra=extra,
    )
    return settings, serving_note(plan)


def _longest(recipe: Recipe) -> int:
    """The tokens of the longest sequence that is captured: a conversation, or one of a suite with its answer."""
    return recipe.data.max_tokens + (recipe.benchmark.max_new_tokens if recipe.data.evaluates_served else 0)


def serve_states(settings: StatesServer, note: dict[str, Any]) -> int:
    """Runs the server until it ends or is stopped; returns its exit code.

    Raises:
        ServerError: there is no such program.
        KeyboardInterrupt: it was stopped by Ctrl-C, or by SIGTERM, and has ended.
    """
    program = shutil.which(settings.vllm)
    if program is None:
        hint = "vLLM has an environment of its own: name its program, --vllm /path/to/environment/bin/vllm"
        raise ServerError(f"{settings.vllm}: no such program", hint=hint)
    prepare_folder(settings.folder, note)
    command = attrs.evolve(settings, vllm=program).command()
    return run_until_stopped(command, {**os.environ, **settings.environment(os.environ)})
