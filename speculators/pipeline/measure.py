"""Measuring a speculator that is on disk, with the verifier that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from speculators.bench.run import bench
from speculators.events import Progress
from speculators.model import SpeculatorModel
from speculators.recipe.schema import BenchmarkSection, VerifierSection
from speculators.verifier.engine import Engine
from speculators.verifier.sources import obtain


def measure_folder(
    folder: Path, section: BenchmarkSection, *, verifier: str | None, progress: Progress
) -> dict[str, Any]:
    """Returns the benchmark of the speculator in `folder` as JSON values.

    Args:
        folder: holds config.json and model.safetensors.
        section: suites, K, temperatures.
        verifier: a folder or hub id instead of the one that config.json names.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SpeculatorModel.from_pretrained(folder).to(device)
    name = verifier or model.config.speculators_config.verifier.name_or_path
    source = str(Path(name).resolve()) if Path(name).is_dir() else name
    kept = next(model.parameters()).dtype
    engine = Engine(obtain(VerifierSection(model=source), progress=progress), dtype=kept, device=device)
    return bench(model, engine, section, name=str(folder), progress=progress).to_json()
