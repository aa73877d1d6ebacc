"""Gathers the lock of a run: the environment, the code, and the verifier's files."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch

from speculators.data.template import ChatTemplate
from speculators.errors import LockError, SpeculatorsError
from speculators.nn.precision import has_bf16_products
from speculators.pipeline.context import Context
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.lock import Code, Environment, Lock, VerifierLock
from speculators.recipe.plan import Plan
from speculators.recipe.values import as_tables
from speculators.training.world import World
from speculators.verifier.sources import verifier_files
from speculators.verifier.tokens import load_tokenizer

# Packages whose code takes part in the numbers, if they are installed.
PACKAGES = (
    "spec-recipes",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "jinja2",
    "gguf",
    "datasets",
)
# Environment variables that choose kernels, or the precision of products.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
)
_PACKAGE = Path(__file__).parents[1]
# Modules and packages whose code can change a number or a fingerprint.
COMPUTING = (
    "chunks",
    "compat",
    "config",
    "contract",
    "drafter",
    "facts",
    "init_from",
    "model",
    "bench",
    "data",
    "decoding",
    "files",
    "formats",
    "losses",
    "models",
    "nn",
    "pipeline",
    "recipe",
    "runs",
    "servers",
    "structure",
    "training",
    "verifier",
)
# They print, compare or convert what others computed, or hold data, which is hashed where it is used: a corrected
# sentence in one of them must not make earlier runs irreproducible.
NOT_COMPUTING = (
    "ablation",
    "__init__",
    "api",
    "benchmarks",
    "cli",
    "cost",
    "diff",
    "doctor",
    "cpu",
    "errors",
    "events",
    "exchange",
    "inspection",
    "recipes",
    "registry",
    "report",
    "reproduce",
    "tracking",
    "tune",
)


def environment_here(world: World) -> Environment:
    """Describes where this process runs, as far as it can affect a result."""
    return Environment(
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
        code=code_here(),
        python=platform.python_version(),
        system=platform.system(),
        machine=platform.machine(),
        device=world.device.type,
        device_name=world.device_name,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        bf16_products=has_bf16_products(world.device.type),
        threads=torch.get_num_threads(),
        world_size=world.size,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def code_here() -> Code:
    """Identifies the code of this package: its version and commit, and a hash of the sources that compute."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        name = file.relative_to(_PACKAGE)
        if name.parts[0].removesuffix(".py") in COMPUTING:
            digest.update(f"{name.as_posix()}\0".encode() + file.read_bytes() + b"\0")
    root = _PACKAGE.parent
    # Not any repository around: a wheel may be installed inside somebody else's checkout.
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    return Code(
        version=metadata.version("spec-recipes"),
        commit=commit,
        dirty=None if commit is None else bool(_git(root, "status", "--porcelain")),
        wheel=_wheel(),
        sources=digest.hexdigest(),
    )


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _wheel() -> str | None:
    """Finds the sha256 of the wheel that pip installed; None for wheels from an index and for editable installs."""
    text = metadata.distribution("spec-recipes").read_text("direct_url.json")
    hashes = json.loads(text).get("archive_info", {}).get("hashes", {}) if text else {}
    return hashes.get("sha256")


def verifier_lock(folder: Path, config: dict[str, Any], section: VerifierSection) -> VerifierLock:
    """Hashes each file of a verifier's folder, and its chat template."""
    return VerifierLock(
        files=verifier_files(folder),
        chat_template=_template(folder, section),
        config=config,
    )


def _template(folder: Path, section: VerifierSection) -> str | None:
    try:
        source = ChatTemplate.of(load_tokenizer(folder, section)).source
    except SpeculatorsError:  # the stage that needs a template reports it
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def lock_of(context: Context, *, idle: bool) -> Lock:
    """Makes the lock of a run that begins or resumes, with the environments that worked on it before.

    Args:
        idle: every stage is done, so that this environment takes no part in the result.
    """
    existing, environment = _existing(context), environment_here(context.world)
    if existing is None:
        section = context.recipe.verifier
        config = context.plan.facts.to_dict()
        verifier = verifier_lock(context.folder, config, section)
        return _lock(context.plan, verifier, environment)
    lock = _lock(context.plan, existing.verifier, existing.environment)
    before = existing.resumed_in
    last = (existing.environment, *before)[-1]
    return attrs.evolve(lock, resumed_in=before if idle or environment == last else (*before, environment))


def _existing(context: Context) -> Lock | None:
    """Reads the run's lock; None if it is missing, unreadable, or of another verifier."""
    try:
        lock = Lock.read(context.run_folder.path)
    except LockError:
        return None
    same = lock.fingerprints.get("verifier") == context.plan.stage("verifier").fingerprint
    return lock if same else None


def _lock(plan: Plan, verifier: VerifierLock, environment: Environment) -> Lock:
    recipe = plan.recipe
    return Lock(
        recipe=json.loads(json.dumps(as_tables(recipe))),
        verifier=verifier,
        fingerprints=plan.fingerprints(),
        inputs=plan.inputs(),
        seed=recipe.seed,
        dtypes={
            "verifier": recipe.verifier.dtype,
            "states": recipe.data.states_dtype,
            "training": plan.precision,
        },
        environment=environment,
    )
