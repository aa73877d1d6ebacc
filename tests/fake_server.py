"""An OpenAI-compatible server in this process that pretends to draft, streams, and counts like vLLM or SGLang."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from speculators.bench.suites import Prompt
from speculators.data.template import ChatTemplate
from speculators.servers.load import Workload
from speculators.verifier.tokens import load_tokenizer

K = 3


def workload_of(verifier: Path, prompts: Sequence[Prompt], *, max_new_tokens: int, concurrency: int = 2) -> Workload:
    """Makes a workload of the suite `mine`, rendered with a verifier's template."""
    return Workload(
        suite="mine",
        prompts=prompts,
        suite_digest="d",
        template=ChatTemplate.of(load_tokenizer(verifier)),
        max_new_tokens=max_new_tokens,
        stop_ids=(7,),
        seed=3,
        concurrency=concurrency,
    )


@attrs.define
class FakeServer:
    """Behaviour of the server, and the requests that it received.

    Attributes:
        pattern: numbers of accepted drafts, repeated over the rounds of each answer. `max_tokens` cuts the last round.
        drafts: whether it speculates.
        engine: the engine whose metric names it uses.
        busy: number of requests to refuse first, with 503.
        counts_chunks: whether each chunk of an answer counts its tokens.
        foreign: tokens generated for somebody else during each answer.
        undrafted: rounds of each answer that it does not count as drafted.
        details: whether an answer ends with the drafts that each of its rounds accepted.
        joins: whether the chunks of two rounds come as one.
        step_seconds: duration of a step by the number of answers under way; None sends each answer at once.
    """

    pattern: Sequence[int] = (2, 0, 3, 1)
    drafts: bool = True
    engine: str = "vllm"
    busy: int = 0
    counts_chunks: bool = True
    foreign: int = 0
    undrafted: int = 0
    details: bool = False
    joins: bool = False
    step_seconds: Callable[[int], float] | None = None
    under_way: int = 0
    requests: list[dict[str, Any]] = attrs.field(factory=list)
    generated: int = 0
    rounds: int = 0
    by_position: list[int] = attrs.field(factory=lambda: [0] * K)
    url: str = ""
    lock: threading.Lock = attrs.field(factory=threading.Lock)

    def steps(self, max_tokens: int) -> list[int]:
        """Computes the tokens of each step of an answer, and counts them."""
        steps, left, index = [1], max_tokens - 1, 0
        with self.lock:
            while left > 0:
                accepted = self.pattern[index % len(self.pattern)] if self.drafts else 0
                steps.append(min(left, accepted + 1))
                left -= steps[-1]
                index += 1
                if self.drafts:
                    self.rounds += 1
                    for depth in range(accepted):
                        self.by_position[depth] += 1
            self.generated += max_tokens + self.foreign
            self.rounds -= min(self.undrafted, index)
        return steps

    def metrics(self) -> str:
        """Writes the text of /metrics."""
        if self.engine == "sglang":
            label = 'model_name="fake",tp_rank="0"'
            lines = [f"sglang:generation_tokens_total{{{label}}} {self.generated:.1f}", "sglang:spec_accept_length 1.9"]
            if self.rounds:
                lines.append(f"sglang:spec_verify_calls_total{{{label}}} {self.rounds:.1f}")
            return "\n".join(lines)
        label = 'engine="0",model_name="a \\"quoted\\" name, {with} braces"'
        lines = ["# HELP vllm:generation_tokens_total Number of tokens", f"vllm:generation_tokens_total{{{label}}} 1e0"]
        lines[-1] = f"vllm:generation_tokens_total{{{label}}} {float(self.generated)!r}"
        if self.drafts:
            lines += [
                f"vllm:spec_decode_num_drafts_total{{{label}}} {self.rounds:.1f}",
                f"vllm:spec_decode_num_drafts_created{{{label}}} 1.7e9",
                f"vllm:spec_decode_num_draft_tokens_total{{{label}}} {K * self.rounds:.1f}",
                f"vllm:spec_decode_num_accepted_tokens_total{{{label}}} {sum(self.by_position):.1f}",
            ]
            lines += [
                f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label},position="{place}"}} {number:.1f}'
                for place, number in enumerate(self.by_position)
            ]
        return "\n".join(lines)

    def events(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the events of a streamed answer."""
        done = 0
        steps = self.steps(request["max_tokens"])
        accepted = [self.pattern[index % len(self.pattern)] for index in range(len(steps) - 1)]
        for size in [*steps[:1], sum(steps[1:3]), *steps[3:]] if self.joins else steps:
            choice: dict[str, Any] = {"index": 0, "text": "ab" * size}
            event: dict[str, Any] = {"choices": [choice]}
            if self.counts_chunks:
                choice["token_ids"] = list(range(done, done + size))
                event["usage"] = {"completion_tokens": done + size}
            done += size
            yield event
        yield {"choices": [], "usage": {"completion_tokens": done}, **self.report(accepted)}

    def report(self, accepted: Sequence[int]) -> dict[str, Any]:
        """Builds what vLLM says about the rounds of an answer; it leaves empty lists out."""
        if not self.details:
            return {}
        rounds = {"per_step_accepted": list(accepted)} if accepted else {}
        return {"metrics": {"speculative_decoding": {"num_spec_steps": len(accepted), "num_spec_tokens": K, **rounds}}}


@contextmanager
def served(fake: FakeServer) -> Iterator[FakeServer]:
    """Serves the fake on a free port of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def _handler(fake: FakeServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Logs nothing."""

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._say(200, fake.metrics().encode())
            elif self.path == "/v1/models":
                self._say(200, json.dumps({"data": [{"id": "fake"}]}).encode())
            elif self.path in ("/version", "/get_server_info"):
                self._say(200, json.dumps({"version": "1.2.3"}).encode())
            else:
                self._say(404, b'{"detail": "Not Found"}')

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                fake.requests.append(request)
                refused = fake.busy > 0
                fake.busy -= refused
            if refused:
                self._say(503, b'{"error": {"message": "the queue is full"}}')
            elif request["model"] != "fake":
                self._say(404, b'{"error": {"message": "The model `other` does not exist."}}')
            elif fake.step_seconds is not None:
                self._stream(request, fake.step_seconds)
            else:
                body = "".join(f"data: {json.dumps(event)}\n\n" for event in fake.events(request))
                self._say(200, (body + "data: [DONE]\n\n").encode())

        def _stream(self, request: dict[str, Any], step_seconds: Callable[[int], float]) -> None:
            with fake.lock:
                fake.under_way += 1
            self.send_response(200)
            self.end_headers()
            for event in fake.events(request):
                time.sleep(step_seconds(fake.under_way))
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            with fake.lock:
                fake.under_way -= 1
            self.wfile.write(b"data: [DONE]\n\n")

        def _say(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
