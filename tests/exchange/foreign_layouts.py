"""Published layouts, written by hand at tiny sizes as each project's own writer leaves them on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save_file

from speculators.config import SpeculatorModelConfig

INPUTS = ("hidden_states", "input_ids", "position_ids", "document_ids")
BLOCK = {"num_layers": 2, "block_size": 4}


@attrs.frozen(eq=False)
class Written:
    """A foreign checkpoint, and the model of ours whose weights it holds."""

    model: Any
    layer_ids: tuple[int, ...]
    format: str


def build(world, algorithm: str, draft_vocab_size: int | None = None, derived: dict | None = None, **options) -> Any:
    """Builds a model in which no two tensors have the same weights, norms included."""
    config = SpeculatorModelConfig.get_class(algorithm)(**options, **(derived or {}))
    model, _ = world.build(config, draft_vocab_size)
    if derived:
        model = type(model)(attrs.evolve(model.config, **derived))
        fresh, _ = world.build(config, draft_vocab_size)
        model.load_state_dict(fresh.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def replayed(world, model, layer_ids: tuple[int, ...], depths: int = 3) -> list[torch.Tensor]:
    """Computes the draft logits of two packed conversations."""
    row = world.row(0, 1, layer_ids=layer_ids)
    batch = {name: row[name] for name in INPUTS}
    return list(model.float().replay(**batch, num_speculative_tokens=depths))


def own(model) -> dict[str, torch.Tensor]:
    """Selects the tensors of a model that are saved."""
    return {name: tensor.clone() for name, tensor in model.saved_names(model.state_dict()).items()}


def decoder(model) -> dict[str, Any]:
    """Writes the decoder in the keys of transformers 4."""
    table = dict(model.config.transformer_layer_config)
    rope = table.pop("rope_parameters")
    table.pop("num_aux_hidden_states", None)
    return {**table, "rope_theta": rope["rope_theta"], "rope_scaling": None}


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Writes config.json and one safetensors file, or shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for index, name in enumerate(sorted(tensors)) if index % shards == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def midlayer(world, folder: Path) -> Written:
    """Writes EAGLE-3 of SpecForge and SGLang: `midlayer`, layer ids counted by the layer a state leaves, no
    embeddings."""
    model = build(world, "eagle3", 96, norm_before_residual=False)
    tensors = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in own(model).items()}
    del tensors["embed_tokens.weight"]
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        **decoder(model),
        "draft_vocab_size": 96,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3], "use_aux_hidden_state": True},
        "torch_dtype": "float32",
        "transformers_version": "4.51.0",
    }
    write(folder, config, tensors)
    return Written(model, (1, 2, 4), "EAGLE-3 of SafeAILab")


def nvidia(world, folder: Path) -> Written:
    """Writes EAGLE-3 as NVIDIA's Model Optimizer does: `layers.*`, with `eagle_config`, without a residual's key."""
    model = build(world, "eagle3", 96, norm_before_residual=False, num_layers=2)
    tensors = own(model)
    del tensors["embed_tokens.weight"], tensors["t2d"]
    table = {
        "eagle_aux_hidden_state_layer_ids": [0, 1, 3],
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "use_mtp_layernorm": False,
        "next_layer_regular": True,
        "parallel_draft_step": 1,
        "parallel_draft_heads_num_layers": 1,
    }
    extra = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "pretraining_tp": None, "use_cache": True}
    config = {"architectures": ["LlamaForCausalLMEagle3"], **decoder(model), **extra, "draft_vocab_size": 96}
    write(folder, {**config, "eagle_config": table, "torch_dtype": "float32"}, tensors)
    return Written(model, (1, 2, 4), "EAGLE-3 of SafeAILab")


def midlayer_sharded(world, folder: Path) -> Written:
    """Writes the same with the norms of EAGLE-3.1 and a `model.` prefix on every name, in two shards."""
    model = build(world, "eagle3", 96, norm_before_residual=False, fc_norm=True, norm_output=True)
    tensors = {f"model.{name.replace('layers.0.', 'midlayer.')}": tensor for name, tensor in own(model).items()}
    ids = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}}
    flags = {"fc_norm": True, "norm_output": True, "draft_vocab_size": 96}
    write(folder, {"architectures": ["LlamaForCausalLMEagle3"], **decoder(model), **ids, **flags}, tensors, shards=2)
    return Written(model, (1, 2, 4), "EAGLE-3 of SafeAILab")


def eagle1(world, folder: Path) -> Written:
    """Writes EAGLE-1 of SafeAILab: no head, only one norm, and a bias of fc."""
    model = build(world, "eagle1", derived={"fc_bias": True})
    shared = ("lm_head.", "verifier_norm.")
    tensors = {name: tensor for name, tensor in own(model).items() if not name.startswith(shared)}
    assert "fc.bias" in tensors
    write(folder, {"architectures": ["LlamaForCausalLM"], "bias": True, **decoder(model)}, tensors)
    return Written(model, (4,), "EAGLE-1")


def zlab(world, folder: Path) -> Written:
    """Writes DFlash of z-lab: the verifier's embeddings and head, layer ids one lower."""
    model = build(world, "dflash", **BLOCK)
    ids = [1, 2, 3]
    config = {
        "architectures": ["DFlashDraftModel"],
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        **decoder(model),
        "block_size": 4,
        "num_target_layers": 4,
        "dflash_config": {"mask_token_id": 319, "target_layer_ids": [id - 1 for id in ids]},
    }
    write(folder, config, own(model))
    return Written(model, (1, 2, 3), "DFlash of z-lab")


def upstream(algorithm: str, ids: str, **options) -> Callable[[Any, Path], Written]:
    """Writes a checkpoint of the speculators project, with its extra keys and frozen copies of the verifier's
    tensors."""

    def writer(world, folder: Path) -> Written:
        model = build(world, algorithm, 96, **options)
        config = model.config.to_dict()
        raw = decoder(model)
        for silent in ("hidden_act", "attention_bias", "mlp_bias", "tie_word_embeddings"):
            raw.pop(silent)  # to_diff_dict leaves out what is the class's own
        config |= {"transformer_layer_config": raw, "transformers_version": "4.57.1", "dtype": "float32"}
        config |= {"has_no_defaults_at_init": False, "speculators_version": "0.5.0"}
        config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] = 2
        if ids == "aux_hidden_state_layer_ids":
            config["sliding_window_non_causal"] = False  # its own default, which is about sliding layers alone
        tensors = {**own(model), "verifier_norm.weight": torch.ones(32), "verifier_lm_head.weight": torch.ones(96, 32)}
        write(folder, config, tensors)
        return Written(model, (1, 2, 4), f"speculators 0.5-0.9, {algorithm}")

    return writer


def medusa(world, folder: Path) -> Written:
    """Writes Medusa of vLLM: blocks without biases, heads over the whole vocabulary cut by an unsorted token map."""
    model = build(world, "medusa", 96, num_heads=3)
    for block in model.blocks:
        for layer in block.layers:
            layer.bias.data.zero_()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    ids, tensors = model.draft_to_target, {}
    for name, tensor in own(model).items():
        if name.startswith("lm_heads."):
            whole = torch.zeros(320, 32)
            whole[ids] = tensor
            tensors[f"medusa_heads.{name}"] = whole
        elif name.startswith("blocks.") and name.endswith("weight"):
            tensors[f"medusa_heads.{name}"] = tensor
    tensors["token_map"] = ids[order]
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": 32,
        "vocab_size": 320,
        "truncated_vocab_size": 96,
        "num_heads": 3,
        "num_hidden_layers": 1,
        "medusa_fc_bias": False,
        "max_paths": 64,
        "topk": 10,
    }
    write(folder, config, tensors)
    return Written(model, (4,), "Medusa of vLLM")


def upstream_mtp(world, folder: Path) -> Written:
    """Writes MTP of the same project: it leaves out what it shares with the verifier and has the verifier's decoder
    config."""
    model = build(world, "mtp")
    whole = json.loads((world.folder / "config.json").read_text())
    config = {
        "speculators_model_type": "mtp",
        "architectures": ["MTPDraftModel"],
        "num_nextn_predict_layers": 1,
        "speculators_version": "0.9.0",
        "speculators_config": {"algorithm": "mtp", "proposal_methods": [{"speculative_tokens": 3}]},
        "transformer_layer_config": whole,
    }
    tensors = {name: tensor for name, tensor in own(model).items() if name.startswith("mtp_layers.")}
    write(folder, config, tensors)
    return Written(model, (4,), "speculators 0.5-0.9, mtp")


AUX, EAGLE_AUX = "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids"
LAYOUTS: dict[str, Callable[[Any, Path], Written]] = {
    "sglang eagle3": midlayer,
    "sglang eagle3.1, sharded": midlayer_sharded,
    "nvidia eagle3": nvidia,
    "safeailab eagle1": eagle1,
    "z-lab dflash": zlab,
    "upstream eagle3": upstream("eagle3", EAGLE_AUX, norm_before_residual=True, num_layers=2),
    "upstream peagle": upstream("peagle", EAGLE_AUX),
    "upstream dflash": upstream("dflash", AUX, **BLOCK),
    "upstream dspark": upstream("dspark", AUX, markov_rank=8, **BLOCK),
    "upstream mtp": upstream_mtp,
    "vllm medusa": medusa,
}
