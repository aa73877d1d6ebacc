"""Reads a verifier's own MTP head from its checkpoint, and writes a trained one into a copy of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from speculators.errors import ArtifactError
from speculators.files.disk import honour_umask
from speculators.model import SpeculatorModel
from speculators.models.mtp.kinds import PREFIX
from speculators.verifier.weights import TensorReader

_LAYER = "mtp_layers.0."
_NAMES = {
    "fc.": "input_proj.",
    "norm.": "final_layernorm.",
    "pre_fc_norm_hidden.": "hidden_layernorm.",
    "pre_fc_norm_embedding.": "token_layernorm.",
    "layers.0.": "",
}
# Some files have one tensor per expert; ours and transformers' have one for all of them.
_EXPERT = re.compile(r"(?P<place>.*mlp\.experts\.)(?P<expert>\d+)\.(?P<part>gate|up|down)_proj\.weight")


def own_name(name: str) -> str:
    """Translates a verifier's tensor name: `mtp.fc.weight` -> `mtp_layers.0.input_proj.weight`.

    Raises:
        ArtifactError: no MTP head of one layer has such a tensor.
    """
    rest = name.removeprefix(PREFIX)
    for theirs, ours in _NAMES.items():
        if rest.startswith(theirs):
            return _LAYER + ours + rest.removeprefix(theirs)
    raise ArtifactError(f"{name}: not a tensor of an MTP head with one layer", hint="set algorithm.native = false")


def extract(folder: Path) -> dict[str, torch.Tensor]:
    """Reads the MTP head of a verifier, by the speculator's names, in the file's dtype.

    Raises:
        ArtifactError: the verifier has none.
    """
    reader = TensorReader(folder)
    names = [name for name in reader.names() if name.startswith(PREFIX)]
    if not names:
        raise ArtifactError(f"{folder} has no {PREFIX}* tensors: no native head", hint="set algorithm.native = false")
    tensors: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, str]] = {}
    for name in names:
        if (match := _EXPERT.fullmatch(name)) is None:
            tensors[own_name(name)] = reader.read(name)
        else:
            experts.setdefault(match["place"] + match["part"], {})[int(match["expert"])] = name
    for place in sorted({part.rpartition(".")[0] for part in experts}):
        parts = {
            part: torch.stack([reader.read(experts[f"{place}.{part}"][expert]) for expert in range(count)])
            for part in ("gate", "up", "down")
            if (count := len(experts[f"{place}.{part}"]))
        }
        tensors[own_name(f"{place}.gate_up_proj")] = torch.cat((parts["gate"], parts["up"]), dim=1)
        tensors[own_name(f"{place}.down_proj")] = parts["down"]
    return tensors


def _tensor_for(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Picks the speculator's tensor, or the part of one, for the verifier's `name`."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return tensors[own_name(name)]
    place, expert = match["place"], int(match["expert"])
    if match["part"] == "down":
        return tensors[own_name(f"{place}down_proj")][expert]
    return tensors[own_name(f"{place}gate_up_proj")][expert].chunk(2)[0 if match["part"] == "gate" else 1]


def stitch(speculator: Path, verifier: Path, into: Path) -> Path:
    """Writes a copy of a verifier with the speculator's MTP head in place of its own, for servers that draft with it.

    Files without `mtp.*` tensors are copied unchanged. In the others only those tensors change, and keep their names,
    order and dtype. An untrained head gives the same bits.

    Args:
        speculator: folder of a saved speculator.
        verifier: folder of the verifier that it was trained from.
        into: must not exist; written completely or not at all.

    Raises:
        ArtifactError: `into` exists, the verifier has no native head, the head has another shape, or a file cannot be
            read or written.
    """
    if into.exists():
        raise ArtifactError(f"{into} already exists", hint="name a new folder")
    model = SpeculatorModel.from_pretrained(speculator)
    own = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(_LAYER)}
    theirs = {name for name in TensorReader(verifier).names() if name.startswith(PREFIX)}
    if not theirs:
        raise ArtifactError(f"{verifier} has no {PREFIX}* tensors to replace: this verifier has no MTP head")
    left = set(own) - {own_name(_EXPERT.sub(_fused, name)) for name in theirs}
    if left:
        raise ArtifactError(f"{verifier}: its MTP head has no place for {', '.join(sorted(left))}")
    partial = into.with_name(f"{into.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in sorted(verifier.iterdir()):
            if file.suffix == ".safetensors":
                _write_shard(file, own, partial / file.name)
            elif file.is_file():
                shutil.copy2(file, partial / file.name)
        partial.replace(into)
    except (SafetensorError, OSError) as error:
        hint = "check that the disk has space for a copy of the verifier, and that its files are complete"
        raise ArtifactError(f"{into}: cannot be written from {verifier}: {error}", hint=hint) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return into


def _fused(match: re.Match[str]) -> str:
    return match["place"] + ("down_proj" if match["part"] == "down" else "gate_up_proj")


def _write_shard(file: Path, own: dict[str, torch.Tensor], to: Path) -> None:
    with safe_open(file, framework="pt") as shard:
        if not any(name.startswith(PREFIX) for name in shard.keys()):  # noqa: SIM118 (not a dict)
            shutil.copy2(file, to)
            return
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        metadata = shard.metadata()
    for name, old in tensors.items():
        if name.startswith(PREFIX):
            new = _tensor_for(name, own)
            if new.shape != old.shape:
                raise ArtifactError(f"{file}: {name} is {list(old.shape)}, the speculator's is {list(new.shape)}")
            tensors[name] = new.to(old.dtype).contiguous()
    save_file(tensors, to, metadata=metadata)
    honour_umask(to)
