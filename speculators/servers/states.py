"""Hidden states out of a running vLLM server: asked for over HTTP, handed over as files in a shared folder."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import safetensors.torch
import torch
from safetensors import SafetensorError

from speculators.errors import ServerError
from speculators.servers.endpoint import Endpoint, in_flight

COMPLETIONS = "/v1/completions"
START = "spec serve-states starts the server as it must be"
# Between two looks at a file that is not whole yet.
_LOOK_SECONDS = 0.005


@attrs.frozen(kw_only=True)
class Served:
    """What a server says of itself.

    Attributes:
        engine: "vllm", "sglang", ... as it calls itself.
        version: of the engine, "" where it tells none.
        model: the name that requests must use.
        root: where the model is, for the server; "" where it tells none.
        max_model_len: tokens of prompt and answer; None where it tells none.
    """

    engine: str
    version: str
    model: str
    root: str
    max_model_len: int | None

    @classmethod
    def at(cls, endpoint: Endpoint) -> Served:
        """Asks; raises ServerError if it cannot be reached or serves no model."""
        listed = endpoint.get("/v1/models")
        models = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise ServerError(f"{endpoint.url}/v1/models: names no model", hint="is it an OpenAI-compatible server?")
        first: dict[str, Any] = models[0]
        try:
            version = str(endpoint.get("/version").get("version", ""))
        except (ServerError, AttributeError):  # only vLLM has it
            version = ""
        return cls(
            engine=str(first.get("owned_by") or ""),
            version=version,
            model=str(first["id"]),
            root=str(first.get("root") or ""),
            max_model_len=first.get("max_model_len"),
        )


@attrs.frozen(kw_only=True)
class StatesClient:
    """Captures as `Engine.capture` does, through a server. Safe to share between threads.

    Attributes:
        endpoint: of the server.
        model: the name that requests must use.
        folder: where it writes states; a path that it tells must be below.
        layer_ids: ids that are wanted: l is the stream entering layer l, N the last layer's output before the norm.
        num_layers: N. The server gives the states of {layer_ids, N}, sorted: it was started so.
        hidden_size: H.
        dtype: that the states must be computed in, or in float32.
        wait_seconds: for a file, after the server has named it.
    """

    endpoint: Endpoint
    model: str
    folder: Path
    layer_ids: tuple[int, ...]
    num_layers: int
    hidden_size: int
    dtype: torch.dtype
    wait_seconds: float = 60.0
    _late: list[Path] = attrs.field(init=False, factory=list)

    def capture_all(
        self, rows: Iterable[tuple[int, torch.Tensor]], *, concurrency: int
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Captures many sequences, several at once.

        Args:
            rows: (index, token ids [n] int64), read as there is room.
            concurrency: requests at once.

        Yields:
            (index, chosen states [n, A*H], last states [n, H]), as they come.

        Raises:
            ServerError: a request failed for good; what came before it was yielded.
        """
        work = in_flight(lambda item: self.capture(item[1]), rows, concurrency=concurrency, stop=self.endpoint.stop)
        try:
            for (index, _), (chosen, last) in work:
                yield index, chosen, last
        finally:
            for path in self._late:
                _remove(path)

    def capture(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the states of one sequence [n]: the chosen [n, A*H] in the order of `layer_ids`, the last [n, H].

        Raises:
            ServerError: it cannot be had, is not finite, or is not what was asked for.
        """
        states = self.endpoint.patiently(lambda: self._attempt(ids.tolist()))
        columns = [sorted_ids(self.layer_ids, self.num_layers).index(layer) for layer in self.layer_ids]
        return states[:, columns].flatten(1), states[:, -1]

    def _attempt(self, ids: list[int]) -> torch.Tensor:
        """Returns [n, layers, H]."""
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "return_token_ids": True}
        answer = self.endpoint.send("POST", COMPLETIONS, body)
        told = answer.get("kv_transfer_params") if isinstance(answer, dict) else None
        name = told.get("hidden_states_path") if isinstance(told, dict) else None
        if not isinstance(name, str):
            words = f"{self.endpoint.url}{COMPLETIONS}: the answer names no file of hidden states"
            raise ServerError(f"{words} (kv_transfer_params is {told!r})", hint=START)
        path = self._inside(name)
        try:
            held = self._held(path)
            return self._checked(held, ids, path)
        finally:
            _remove(path)

    def _inside(self, name: str) -> Path:
        """Returns the path that the server told, if it is one that it may tell: we read and remove what is there."""
        path, folder = Path(name).resolve(), self.folder.resolve()
        if path == folder or not path.is_relative_to(folder):
            hint = (
                f"it was started with another folder than this recipe's: set data.server.folder, or restart it; {START}"
            )
            raise ServerError(f"{self.endpoint.url}: names {name}, which is not in {folder}", hint=hint)
        return path

    def _held(self, path: Path) -> dict[str, torch.Tensor]:
        """Returns the tensors of a file that may still be in the writing."""
        until = time.monotonic() + self.wait_seconds
        while True:
            with _shared_lock(path) as free:
                try:
                    if free:
                        return safetensors.torch.load(path.read_bytes())
                except (OSError, SafetensorError, ValueError):
                    pass  # not there yet, or, where the server takes no lock, not whole
            if time.monotonic() > until:
                self._late.append(path)
                found = "no whole safetensors file" if path.exists() else "nothing"
                words = f"{self.endpoint.url}: names {path}, and after {self.wait_seconds:g} s {found} is there"
                hint = "do both sides see the same folder? has its disk room? the server's log tells of its writer"
                raise ServerError(words, hint=hint, passes=True)
            time.sleep(_LOOK_SECONDS)

    def _checked(self, held: dict[str, torch.Tensor], ids: list[int], path: Path) -> torch.Tensor:
        """Returns the states, if they are those of `ids` at the layers that were asked for."""
        where = f"{self.endpoint.url}, {path.name}"
        lacking = {"hidden_states", "token_ids"} - held.keys()
        if lacking:
            raise ServerError(f"{where}: has no {' and no '.join(sorted(lacking))}", hint=START)
        states, tokens = held["hidden_states"], held["token_ids"].tolist()
        if len(tokens) != len(ids) or len(states) != len(ids):
            words = f"{where}: {len(ids)} tokens were sent, and {len(states)} states of {len(tokens)} tokens came back"
            raise ServerError(words, hint=f"prefix caching does this, and chunked prefill: switch them off; {START}")
        if tokens != ids:
            place = next(place for place, pair in enumerate(zip(tokens, ids, strict=True)) if pair[0] != pair[1])
            words = f"{where}: the states are of other tokens: {tokens[place]} at place {place}, sent was {ids[place]}"
            raise ServerError(words)
        wanted = sorted_ids(self.layer_ids, self.num_layers)
        if list(states.shape[1:]) != [len(wanted), self.hidden_size]:
            words = f"{where}: states of shape {list(states.shape)} came, for layers {wanted} of {self.hidden_size}"
            raise ServerError(f"{words} it would be {[len(ids), len(wanted), self.hidden_size]}", hint=START)
        if states.dtype not in (self.dtype, torch.float32):
            kinds = [str(kind).removeprefix("torch.") for kind in (states.dtype, self.dtype)]
            hint = f"start it with --dtype {kinds[1]}, or set data.states_dtype"
            raise ServerError(f"{where}: computed in {kinds[0]}, and the recipe wants {kinds[1]}", hint=hint)
        if bad := [layer for place, layer in enumerate(wanted) if not torch.isfinite(states[:, place]).all()]:
            hint = "in float16 states overflow above 65504: serve and store them in bfloat16"
            raise ServerError(f"{where}: the states of layers {bad} are not finite", hint=hint)
        return states


def sorted_ids(layer_ids: Sequence[int], num_layers: int) -> list[int]:
    """Returns the ids that a server is started with, in the order in which it gives them: the last one always."""
    return sorted({*layer_ids, num_layers})


@contextlib.contextmanager
def _shared_lock(path: Path) -> Iterator[bool]:
    """Yields whether nobody writes: the server holds the lock on `<path>.lock` while it does, if there is one."""
    try:
        with _lock_file(path).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
    except FileNotFoundError:
        yield True


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _remove(path: Path) -> None:
    for file in (path, _lock_file(path)):
        file.unlink(missing_ok=True)
