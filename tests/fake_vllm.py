"""An inference server in this process that speaks vLLM's HTTP, with states from a function and faults on demand."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

# Token ids -> their states [n, layers, H].
States = Callable[[list[int]], torch.Tensor]
# Body of a request -> the choice that answers it, with the response's `usage` if it has any.
Answers = Callable[[dict[str, Any]], dict[str, Any]]


class FakeServer:
    """Serves until the context ends.

    Args:
        folder: where it writes states.
        states: computes the states of a request's tokens; None for a server of answers only.
        answers: computes the answers; None for a constant one.
        faults: faults of the requests in turn, "" for none. Later requests succeed.
        seconds: time to write a file after the response has named it.
        model: changes to its entry in /v1/models.
    """

    def __init__(
        self,
        folder: Path,
        states: States | None = None,
        *,
        answers: Answers | None = None,
        faults: Iterable[str] = (),
        seconds: float = 0.0,
        **model: Any,
    ) -> None:
        self.folder, self.states, self.answers = folder, states, answers
        self.faults, self.seconds = deque(faults), seconds
        self.model = {"id": "the-model", "owned_by": "vllm", "root": "/models/it", "max_model_len": 4096, **model}
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        # Tests compute with one model, whose hooks and caches are not thread-safe.
        self._model = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FakeServer:
        # The poll is short because closing waits for it.
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def die(self) -> None:
        """Refuses connections from now on."""
        self._http.shutdown()
        self._http.server_close()

    def next_fault(self, body: dict[str, Any]) -> str:
        """Records a request and picks its fault."""
        with self._lock:
            self.requests.append(body)
            return self.faults.popleft() if self.faults else ""

    def busy(self, change: int) -> None:
        with self._lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)

    def completion(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        """Starts writing the states, then answers."""
        with self._model:
            choice = self.answers(body) if self.answers else {"text": "a", "token_ids": [97]}
        usage = {key: choice.pop(key) for key in ("usage",) if key in choice}
        answer: dict[str, Any] = {"choices": [{"prompt_token_ids": body["prompt"], **choice}], **usage}
        if self.states is not None and fault != "no name":
            place = f"{self._http.server_address[1]}-{len(self.requests)}-{threading.get_ident()}"
            path = self.folder / f"cmpl-{place}.safetensors"
            named = {"outside": self.folder.parent / path.name, "link": self.folder / "link" / path.name}.get(
                fault, path
            )
            if fault != "no file":
                self._write(path, body["prompt"], fault)
            answer["kv_transfer_params"] = {"hidden_states_path": str(named)}
        return answer

    def _write(self, path: Path, ids: list[int], fault: str) -> None:
        with self._model:
            states = self.states(ids)
        tokens = torch.tensor(ids)
        if fault == "nan":
            states[1, 0, 0] = float("nan")
        elif fault == "tokens":
            tokens[2] += 1
        elif fault == "short":
            states, tokens = states[3:], tokens[3:]
        elif fault == "layers":
            states = states[:, 1:]
        elif fault == "half":
            states = states.half()
        content = safetensors.torch.save({"hidden_states": states.contiguous(), "token_ids": tokens})
        # Like vLLM's connector: it takes the lock before the client learns the path, and releases it when the file is
        # complete.
        lock = path.with_name(f"{path.name}.lock").open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write() -> None:
            with lock:
                path.write_bytes(content[: len(content) // 2])
                time.sleep(self.seconds)
                path.write_bytes(content if fault != "torn" else content[:-8])

        threading.Thread(target=write, daemon=True).start()


ERRORS = {
    "500": (500, {"error": {"message": "EngineCore encountered an issue", "type": "InternalServerError", "code": 500}}),
    "429": (429, {"object": "error", "message": "too many requests", "code": 429}),
    "400": (400, {"error": {"message": "This model's maximum context length is 8 tokens.", "code": 400}}),
}


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            server.keys.append(self.headers["Authorization"])
            pages = {"/v1/models": {"data": [server.model]}, "/version": {"version": "0.32.0"}}
            if self.path == "/metrics":
                self._send(200, b"up 1\n")
            elif self.path in pages:
                self._send(200, json.dumps(pages[self.path]).encode())
            else:
                self._send(404, b'{"detail": "Not Found"}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            fault = server.next_fault(body)
            server.busy(1)
            try:
                self._answer(body, fault)
            finally:
                server.busy(-1)

        def _answer(self, body: dict[str, Any], fault: str) -> None:
            if fault in ERRORS:
                status, document = ERRORS[fault]
                self._send(status, json.dumps(document).encode())
            elif fault == "drop":
                self.close_connection = True
            elif fault == "html":
                self._send(502, b"<html>\n<h1>Bad Gateway</h1> nobody is there</html>")
            elif fault == "no json":
                self._send(200, b"hello")
            elif fault == "silent":
                time.sleep(1.0)
            else:
                self._send(200, json.dumps(server.completion(body, fault)).encode())

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
