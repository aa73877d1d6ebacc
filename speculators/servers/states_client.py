"""Hidden states from one vLLM server: requested over HTTP, delivered as files in a shared folder, deleted once read."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import safetensors.torch
import torch
from safetensors import SafetensorError

from speculators.errors import ServerError
from speculators.servers.endpoint import COMPLETIONS, Endpoint

START_HINT = "`spec serve-states RECIPE` starts a server with the right options"
# Between two attempts to read a file that is not complete yet.
_POLL_SECONDS = 0.005


@attrs.frozen(kw_only=True)
class StatesClient:
    """Captures one sequence at a time through a server. Threads may share it.

    Attributes:
        endpoint: of the server.
        model: the name that requests must use.
        folder: where the server writes states. Paths outside it are refused.
        layer_ids: states to return: id l is the stream entering layer l, id N the last layer's output before the norm.
        num_layers: N. The server was started with {layer_ids, N}, and returns their states in ascending order.
        hidden_size: H.
        dtype: required dtype of the computation; float32 is accepted as well.
        wait_seconds: how long to wait for a file after the server has named it.
    """

    endpoint: Endpoint
    model: str
    folder: Path
    layer_ids: tuple[int, ...]
    num_layers: int
    hidden_size: int
    dtype: torch.dtype
    wait_seconds: float = 60.0
    # Files that did not arrive in time. They may still arrive, and are removed at the end.
    _late: list[Path] = attrs.field(init=False, factory=list)

    def attempt(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Requests the states of one sequence once.

        Args:
            ids: token ids [n].

        Returns:
            The chosen states [n, A*H] in the order of `layer_ids`, and the last layer's [n, H].

        Raises:
            ServerError: the states cannot be fetched, are not finite, or do not match the request; `passes` says
                whether another attempt may succeed.
        """
        states = self._requested(ids.tolist())  # [n, layers, H]
        columns = [served_layer_ids(self.layer_ids, self.num_layers).index(layer) for layer in self.layer_ids]
        return states[:, columns].flatten(1), states[:, -1]

    def discard(self, name: str) -> None:
        """Removes a file of states that came with an answer, once it is complete.

        Raises:
            ServerError: the file is outside the folder, or does not arrive.
        """
        path = self._inside(name)
        self._load(path)
        _remove(path)

    def remove_late(self) -> None:
        """Removes files that arrived after nobody waited for them any more."""
        for path in self._late:
            _remove(path)

    def _requested(self, ids: list[int]) -> torch.Tensor:
        """Requests all states: [n, layers, H], layers in ascending order."""
        # vLLM needs at least one token to generate; the answer itself is ignored.
        body = {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0, "return_token_ids": True}
        response = self.endpoint.send("POST", COMPLETIONS, body)
        transfer = response.get("kv_transfer_params") if isinstance(response, dict) else None
        name = transfer.get("hidden_states_path") if isinstance(transfer, dict) else None
        if not isinstance(name, str):
            raise ServerError(
                f"{self.endpoint.url}{COMPLETIONS}: the response names no file of hidden states "
                f"(kv_transfer_params is {transfer!r})",
                hint=START_HINT,
            )
        path = self._inside(name)
        try:
            return self._checked(self._load(path), ids, path)
        finally:
            _remove(path)

    def _inside(self, name: str) -> Path:
        """Resolves a path that the server named, and refuses one outside the folder: we delete what we have read."""
        path, folder = Path(name).resolve(), self.folder.resolve()
        if path == folder or not path.is_relative_to(folder):
            hint = (
                "it was started with a different folder from this recipe's: set data.server.folder to that folder, or "
                f"restart it; {START_HINT}"
            )
            raise ServerError(f"{self.endpoint.url}: named the file {name}, which is not in {folder}", hint=hint)
        return path

    def _load(self, path: Path) -> dict[str, torch.Tensor]:
        """Loads a file that the server may still be writing."""
        until = time.monotonic() + self.wait_seconds
        while True:
            with _shared_lock(path) as free:
                try:
                    if free:
                        tensors: dict[str, torch.Tensor] = safetensors.torch.load(path.read_bytes())
                        return tensors
                except (OSError, SafetensorError, ValueError):
                    pass  # Not there yet; or incomplete, if the server takes no lock.
            if time.monotonic() > until:
                self._late.append(path)
                state = "incomplete" if path.exists() else "missing"
                raise ServerError(
                    f"{self.endpoint.url}: named the file {path}, which is still {state} after {self.wait_seconds:g} s",
                    hint="do both sides see the same folder? is its disk full? check the server's log",
                    passes=True,
                )
            time.sleep(_POLL_SECONDS)

    def _checked(self, tensors: dict[str, torch.Tensor], ids: list[int], path: Path) -> torch.Tensor:
        """Checks that a file holds the states of `ids` at the requested layers; returns them, [n, layers, H]."""
        where = f"{self.endpoint.url}, {path.name}"
        if lacking := {"hidden_states", "token_ids"} - tensors.keys():
            raise ServerError(f"{where}: has no {' and no '.join(sorted(lacking))}", hint=START_HINT)
        states, tokens = tensors["hidden_states"], tensors["token_ids"].tolist()
        if len(tokens) != len(ids) or len(states) != len(ids):
            raise ServerError(
                f"{where}: {len(ids)} tokens were sent, but {len(states)} states of {len(tokens)} tokens came back",
                hint=f"prefix caching and chunked prefill cause this: switch them off; {START_HINT}",
            )
        if tokens != ids:
            place = next(place for place, pair in enumerate(zip(tokens, ids, strict=True)) if pair[0] != pair[1])
            raise ServerError(
                f"{where}: the states belong to different tokens: at place {place} the file has token {tokens[place]}, "
                f"but {ids[place]} was sent"
            )
        layers = served_layer_ids(self.layer_ids, self.num_layers)
        expected = [len(ids), len(layers), self.hidden_size]
        if list(states.shape[1:]) != expected[1:]:
            raise ServerError(
                f"{where}: the states have shape {list(states.shape)}; layers {layers} of size {self.hidden_size} need "
                f"{expected}",
                hint=START_HINT,
            )
        if states.dtype not in (self.dtype, torch.float32):
            actual, required = (str(dtype).removeprefix("torch.") for dtype in (states.dtype, self.dtype))
            hint = f"start it with --dtype {required}, or change data.states_dtype"
            raise ServerError(f"{where}: computed in {actual}, but the recipe requires {required}", hint=hint)
        if bad := [layer for column, layer in enumerate(layers) if not torch.isfinite(states[:, column]).all()]:
            hint = "float16 states overflow above 65504: serve and store them in bfloat16"
            raise ServerError(f"{where}: the states of layers {bad} are not finite", hint=hint)
        return states


def served_layer_ids(layer_ids: Sequence[int], num_layers: int) -> list[int]:
    """Lists the layer ids that a server is started with: ascending, which is vLLM's order, and always the last one."""
    return sorted({*layer_ids, num_layers})


@contextlib.contextmanager
def _shared_lock(path: Path) -> Iterator[bool]:
    """Yields whether the file can be read now: while a server writes, it locks `<path>.lock`."""
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
