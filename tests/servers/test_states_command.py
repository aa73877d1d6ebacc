"""The command line of a server of hidden states, and its connector."""

from __future__ import annotations

import ast
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from speculators.servers.states_server import CONNECTOR, CONNECTOR_FOLDER, CONNECTOR_MODULE, StatesServer, shell_line


def settings(**changes: Any) -> StatesServer:
    return StatesServer(
        **{
            "model": "/models/it",
            "name": "owner/model",
            "revision": None,
            "trust_remote_code": False,
            "layer_ids": (2, 15, 27),
            "num_layers": 30,
            "dtype": "float32",
            "max_model_len": 1025,
            "folder": Path("/shared/states"),
            "device": "cpu",
            "host": "127.0.0.1",
            "port": 8000,
            "vllm": "vllm",
            **changes,
        }
    )


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_the_last_layers_state_is_always_requested() -> None:
    """vLLM gets the ids in ascending order, each once; it counts layers as this package does."""
    for ids in ((2, 15, 27), (27, 2, 15), (2, 15, 27, 30)):
        config = json.loads(option(settings(layer_ids=ids).command(), "--speculative-config"))
        assert config["method"] == "extract_hidden_states"
        assert config["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 15, 27, 30]


def test_no_state_of_a_conversation_is_missing() -> None:
    """Prefix cache and chunks are off, and one forward has room for the longest conversation (vllm#44485)."""
    command = settings(max_model_len=5000).command()
    assert {"--no-enable-prefix-caching", "--no-enable-chunked-prefill"} <= {*command}
    assert option(command, "--max-model-len") == option(command, "--max-num-batched-tokens") == "5000"
    assert option(settings().command(), "--max-num-batched-tokens") == "2048"


def test_a_cpu_gets_the_connector_without_pinned_memory() -> None:
    """PYTHONPATH names a folder with nothing else in it; a GPU gets vLLM's own connector and no variable."""
    on_cpu, on_gpu = settings(), settings(device="cuda")
    transfer = json.loads(option(on_cpu.command(), "--kv-transfer-config"))
    assert (transfer["kv_connector"], transfer["kv_connector_module_path"]) == (CONNECTOR, CONNECTOR_MODULE)
    assert transfer["kv_connector_extra_config"] == {"shared_storage_path": "/shared/states"}
    assert on_cpu.environment({"PYTHONPATH": "/mine"})["PYTHONPATH"] == f"{CONNECTOR_FOLDER}:/mine"
    assert "VLLM_CPU_KVCACHE_SPACE" not in on_cpu.environment({"VLLM_CPU_KVCACHE_SPACE": "9"})
    transfer = json.loads(option(on_gpu.command(), "--kv-transfer-config"))
    assert transfer["kv_connector"] == "ExampleHiddenStatesConnector"
    assert on_gpu.environment({}) == {}


def test_a_hub_model_is_named_with_its_revision() -> None:
    """Code of the model runs only if the recipe allows it; arguments after `--` come last, unchanged."""
    command = settings(model="owner/model", revision="abc", trust_remote_code=True, extra=("-tp", "8")).command()
    assert command[:3] == ["vllm", "serve", "owner/model"]
    assert option(command, "--revision") == "abc"
    assert "--trust-remote-code" in command
    assert command[-2:] == ["-tp", "8"]
    assert not {"--revision", "--trust-remote-code"} & {*settings().command()}


def test_the_printed_line_is_the_command() -> None:
    """A shell parses the line back into the same arguments."""
    server = settings()
    arguments = shlex.split(shell_line(server.command(), server.environment({})))
    assert arguments[2:] == server.command()
    assert arguments[0] == f"PYTHONPATH={CONNECTOR_FOLDER}"


def test_the_connector_needs_nothing_of_this_package() -> None:
    """It runs in vLLM's environment, so it imports nothing of ours and is alone in its folder."""
    file = CONNECTOR_FOLDER / f"{CONNECTOR_MODULE}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = {
        node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    imports |= {
        name.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert imports <= {"__future__", "fcntl", "os", "pathlib", "typing", "torch", "vllm"}
    assert {path.name for path in CONNECTOR_FOLDER.glob("*.py")} == {file.name, "__init__.py"}
    assert CONNECTOR in {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_computed_in_the_recipes_dtype(dtype: str) -> None:
    """Capture refuses states of another dtype."""
    assert option(settings(dtype=dtype).command(), "--dtype") == dtype
