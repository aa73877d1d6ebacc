"""Starts a vLLM server of hidden states: its command line, its environment, and the process in the foreground."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import attrs

from speculators.chunks import CHUNKS
from speculators.servers.states_client import served_layer_ids

# A folder with one module, which goes onto the path of vLLM's own environment. That environment needs nothing else of
# this package.
CONNECTOR_FOLDER = Path(__file__).parent / "connector"
CONNECTOR_MODULE, CONNECTOR = "spec_states_connector", "PageableHiddenStatesConnector"
# Time for a server to finish its requests and free its devices after it was asked to stop.
GRACE_SECONDS = 15.0


@attrs.frozen(kw_only=True)
class StatesServer:
    """Settings of a server of hidden states.

    Attributes:
        model: a folder or a hub id.
        name: that requests use.
        revision: of a hub id.
        trust_remote_code: whether code that comes with the model may run.
        layer_ids: layers whose states are requested. The last layer's are returned too.
        num_layers: N.
        dtype: of weights and states.
        max_model_len: tokens of the longest conversation, plus the one that vLLM insists on generating.
        folder: where it writes.
        device: "cpu" or "cuda".
        host: where it listens.
        port: where it listens.
        vllm: the program.
        extra: further arguments of `vllm serve`.
    """

    model: str
    name: str
    revision: str | None
    trust_remote_code: bool
    layer_ids: tuple[int, ...]
    num_layers: int
    dtype: str
    max_model_len: int
    folder: Path
    device: str
    host: str
    port: int
    vllm: str
    extra: tuple[str, ...] = ()

    def command(self) -> list[str]:
        """Builds the program and its arguments."""
        speculative = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {
                "hf_config": {"eagle_aux_hidden_state_layer_ids": served_layer_ids(self.layer_ids, self.num_layers)}
            },
        }
        options: dict[str, object] = {
            "--served-model-name": self.name,
            "--revision": self.revision,
            "--host": self.host,
            "--port": self.port,
            "--dtype": self.dtype,
            "--max-model-len": self.max_model_len,
            # A conversation must fit into one forward. With chunks, or with a prefix taken from the cache, the states
            # of some of its tokens would be missing.
            "--max-num-batched-tokens": max(CHUNKS[self.device].served_tokens, self.max_model_len),
            "--speculative-config": json.dumps(speculative),
            "--kv-transfer-config": json.dumps(self._transfer()),
        }
        command = [self.vllm, "serve", self.model, "--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
        command += ["--trust-remote-code"] if self.trust_remote_code else []
        command += ["--enforce-eager"] if self.device == "cpu" else []
        command += [part for name, value in options.items() if value is not None for part in (name, str(value))]
        return [*command, *self.extra]

    def _transfer(self) -> dict[str, object]:
        # vLLM's own connector copies through pinned memory, which needs a GPU's driver.
        own = {"kv_connector": CONNECTOR, "kv_connector_module_path": CONNECTOR_MODULE}
        return {
            **(own if self.device == "cpu" else {"kv_connector": "ExampleHiddenStatesConnector"}),
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(self.folder)},
        }

    def environment(self, current: Mapping[str, str]) -> dict[str, str]:
        """Computes the variables to add to the `current` ones."""
        if self.device != "cpu":
            return {}
        path = current.get("PYTHONPATH")
        added = {"PYTHONPATH": f"{CONNECTOR_FOLDER}:{path}" if path else str(CONNECTOR_FOLDER)}
        # GiB for the keys, values and states of all conversations in flight. vLLM's default takes most of the memory.
        return added if "VLLM_CPU_KVCACHE_SPACE" in current else {**added, "VLLM_CPU_KVCACHE_SPACE": "2"}


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Quotes a command with its variables, for people to paste into a shell."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])


def run_until_stopped(command: Sequence[str], environment: Mapping[str, str], *, grace: float = GRACE_SECONDS) -> int:
    """Runs a program in the foreground, without a shell, and returns its exit code.

    The program gets a process group of its own, so that a terminal's Ctrl-C reaches it once, through us. If it does
    not end within `grace` seconds after that, its whole group is killed.
    """
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return child.wait()
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(timeout=grace)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        signal.signal(signal.SIGTERM, before)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
