"""The command that starts a vLLM server of hidden states."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from speculators.servers.states import sorted_ids

# A folder of its own with one module: vLLM's environment gets it on its path and needs nothing else of this package.
CONNECTOR_FOLDER = Path(__file__).parent / "connector"
CONNECTOR_MODULE, CONNECTOR = "spec_states_connector", "PageableHiddenStatesConnector"
# Of one forward, where the longest conversation is no longer.
BATCHED_TOKENS = {"cpu": 2048, "cuda": 8192}


@attrs.frozen(kw_only=True)
class ServeStates:
    """What a server of hidden states is started with.

    Attributes:
        model: a folder, or a hub id.
        name: that requests use.
        revision: of a hub id.
        trust_remote_code: let it run code that comes with the model.
        layer_ids: whose states are wanted; the last layer's are given, too.
        num_layers: N.
        dtype: of weights and states.
        max_model_len: tokens of the longest conversation, and one more that has to be answered.
        folder: that it writes to.
        device: "cpu" or "cuda".
        host, port: where it listens.
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
        """Returns program and arguments."""
        speculative = {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {
                "hf_config": {"eagle_aux_hidden_state_layer_ids": sorted_ids(self.layer_ids, self.num_layers)}
            },
        }
        batched = max(BATCHED_TOKENS[self.device], self.max_model_len)
        options: dict[str, object] = {
            "--served-model-name": self.name,
            "--revision": self.revision,
            "--host": self.host,
            "--port": self.port,
            "--dtype": self.dtype,
            "--max-model-len": self.max_model_len,
            # All of a conversation in one forward: without chunks, and without a prefix that another one has computed,
            # whose states would be missing.
            "--max-num-batched-tokens": batched,
            "--speculative-config": json.dumps(speculative),
            "--kv-transfer-config": json.dumps(self._transfer()),
        }
        command = [self.vllm, "serve", self.model, "--no-enable-prefix-caching", "--no-enable-chunked-prefill"]
        command += ["--trust-remote-code"] if self.trust_remote_code else []
        command += ["--enforce-eager"] if self.device == "cpu" else []
        command += [part for name, value in options.items() if value is not None for part in (name, str(value))]
        return [*command, *self.extra]

    def _transfer(self) -> dict[str, object]:
        # The connector that vLLM has copies through pinned memory, which only a GPU's driver gives.
        own = {"kv_connector": CONNECTOR, "kv_connector_module_path": CONNECTOR_MODULE}
        return {
            **(own if self.device == "cpu" else {"kv_connector": "ExampleHiddenStatesConnector"}),
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(self.folder)},
        }

    def environment(self, here: Mapping[str, str]) -> dict[str, str]:
        """Returns the variables that it needs besides those that are there."""
        if self.device != "cpu":
            return {}
        told = here.get("PYTHONPATH")
        added = {"PYTHONPATH": f"{CONNECTOR_FOLDER}:{told}" if told else str(CONNECTOR_FOLDER)}
        # GiB for keys, values and states of all conversations at once; vLLM's own default is most of the memory.
        return added if "VLLM_CPU_KVCACHE_SPACE" in here else {**added, "VLLM_CPU_KVCACHE_SPACE": "2"}


def shell_line(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Returns a command for people to paste into a shell."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(command)])
