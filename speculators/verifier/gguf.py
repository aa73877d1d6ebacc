"""Converts a GGUF file into a Hugging Face folder; `python -m speculators.verifier.gguf FILE FOLDER`.

Uses transformers' own reader. Weights are written as float32, which holds de-quantised values (scale x integer +
offset) exactly; only a quarter of the Q4_1 weights of SmolLM2 survive a rounding to bfloat16. An engine with another
dtype casts on loading.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from speculators.errors import SpeculatorsError, VerifierError
from speculators.events import Progress
from speculators.verifier.command import run_python

NEEDED = ("gguf", "accelerate")


def convert(file: Path, folder: Path, *, progress: Progress) -> None:
    """Writes `folder` (safetensors, tokenizer, config, generation config) from a GGUF file.

    Works in a process of its own: for some seconds it needs three times the unpacked size of the file, which must not
    become the peak memory of a whole run.

    Raises:
        VerifierError: a library is missing, or the file is truncated, damaged or of an unknown architecture.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise VerifierError(
            f"reading a GGUF verifier needs {' and '.join(missing)}, which this environment lacks",
            hint="pip install 'spec-recipes[quickstart]'",
        )
    code, output = run_python(
        ["-m", "speculators.verifier.gguf", str(file), str(folder)],
        progress=progress,
        note=f"converting {file.name} to safetensors",
        environment={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    if code != 0:
        reason = output.splitlines()[-1] if output else f"the converter ended with code {code}"
        raise VerifierError(f"cannot convert the GGUF file {file.name}: {reason}")


def _convert(file: Path, folder: Path) -> None:
    metadata = _read_metadata(file)
    # Late: transformers takes seconds to import, and a damaged file is reported before that.
    from speculators.verifier.quiet import quiet

    with quiet():
        _write_folder(file, folder, metadata)


def _write_folder(file: Path, folder: Path, metadata: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from speculators.verifier.tokens import stop_ids

    place, name = str(file.parent), file.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    _split_digits(tokenizer, metadata)
    model, loading = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, dtype=torch.float32, output_loading_info=True
    )
    if loading["missing_keys"]:
        raise VerifierError(f"tensors are missing: {', '.join(sorted(loading['missing_keys']))}")
    # transformers still considers the model quantised, and would refuse to save or cast it.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    _tidy_floats(model.config)
    ends = stop_ids(tokenizer, model.generation_config)
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=list(ends) if len(ends) > 1 else ends[0],
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        do_sample=False,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_metadata(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    # The reader does not validate: a truncated file raises whatever its first wrong offset leads to.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError, TypeError) as error:
        raise VerifierError(f"the file is truncated or is not GGUF ({error})") from error
    return {key: reader.fields[key].contents() for key in ("tokenizer.ggml.pre",) if key in reader.fields}


def _split_digits(tokenizer: Any, metadata: dict[str, Any]) -> None:
    """Restores SmolLM's rule that each digit is a token of its own, which transformers' GGUF reader drops."""
    from tokenizers.pre_tokenizers import Digits, Sequence

    if metadata.get("tokenizer.ggml.pre") == "smollm":
        inner = tokenizer.backend_tokenizer
        inner.pre_tokenizer = Sequence([Digits(individual_digits=True), inner.pre_tokenizer])


def _tidy_floats(config: Any) -> None:
    """Writes 9.999999747378752e-06 as 1e-05: GGUF stores float32, and both are the same float32."""
    for key, value in config.__dict__.items():
        if isinstance(value, float) and float(np.float32(value)) == value:
            setattr(config, key, float(str(np.float32(value))))


def _main(file: str, folder: str) -> int:
    logging.disable(logging.WARNING)
    try:
        _convert(Path(file), Path(folder))
    except SpeculatorsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2]))
