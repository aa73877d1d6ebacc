"""The command that starts a server of hidden states, and the connector that it takes along."""

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


def test_the_last_layers_state_is_always_asked_for() -> None:
    """Sorted, each once: the ids that vLLM takes are those of this package."""
    for ids in ((2, 15, 27), (27, 2, 15), (2, 15, 27, 30)):
        told = json.loads(option(settings(layer_ids=ids).command(), "--speculative-config"))
        assert told["method"] == "extract_hidden_states"
        assert told["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"] == [2, 15, 27, 30]


def test_nothing_is_left_out_of_a_conversation() -> None:
    """No prefix cache, no chunks, and room for the longest conversation in one forward (vllm#44485)."""
    command = settings(max_model_len=5000).command()
    assert {"--no-enable-prefix-caching", "--no-enable-chunked-prefill"} <= {*command}
    assert option(command, "--max-model-len") == option(command, "--max-num-batched-tokens") == "5000"
    assert option(settings().command(), "--max-num-batched-tokens") == "2048"


def test_a_cpu_gets_the_connector_without_pinned_memory() -> None:
    """From a folder that holds nothing else, by PYTHONPATH; a GPU gets vLLM's own and no variable."""
    on_cpu, on_gpu = settings(), settings(device="cuda")
    told = json.loads(option(on_cpu.command(), "--kv-transfer-config"))
    assert (told["kv_connector"], told["kv_connector_module_path"]) == (CONNECTOR, CONNECTOR_MODULE)
    assert told["kv_connector_extra_config"] == {"shared_storage_path": "/shared/states"}
    assert on_cpu.environment({"PYTHONPATH": "/mine"})["PYTHONPATH"] == f"{CONNECTOR_FOLDER}:/mine"
    assert "VLLM_CPU_KVCACHE_SPACE" not in on_cpu.environment({"VLLM_CPU_KVCACHE_SPACE": "9"})
    told = json.loads(option(on_gpu.command(), "--kv-transfer-config"))
    assert told["kv_connector"] == "ExampleHiddenStatesConnector"
    assert on_gpu.environment({}) == {}


def test_a_hub_model_is_named_with_its_revision() -> None:
    """And code of the model runs only where the recipe lets it; what follows `--` comes last, as it is."""
    command = settings(model="owner/model", revision="abc", trust_remote_code=True, extra=("-tp", "8")).command()
    assert command[:3] == ["vllm", "serve", "owner/model"]
    assert option(command, "--revision") == "abc"
    assert "--trust-remote-code" in command
    assert command[-2:] == ["-tp", "8"]
    assert not {"--revision", "--trust-remote-code"} & {*settings().command()}


def test_the_printed_line_is_the_command() -> None:
    """A shell reads it back as it was."""
    served = settings()
    words = shlex.split(shell_line(served.command(), served.environment({})))
    assert words[2:] == served.command()
    assert words[0] == f"PYTHONPATH={CONNECTOR_FOLDER}"


def test_the_connector_needs_nothing_of_this_package() -> None:
    """It runs in vLLM's environment, alone on its path: no import of ours, no other module beside it."""
    file = CONNECTOR_FOLDER / f"{CONNECTOR_MODULE}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"))
    told = {
        node.module.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    told |= {
        name.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    assert told <= {"__future__", "fcntl", "os", "pathlib", "typing", "torch", "vllm"}
    assert {path.name for path in CONNECTOR_FOLDER.glob("*.py")} == {file.name, "__init__.py"}
    assert CONNECTOR in {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_states_are_computed_in_the_type_of_the_recipe(dtype: str) -> None:
    """Else capture refuses them."""
    assert option(settings(dtype=dtype).command(), "--dtype") == dtype
