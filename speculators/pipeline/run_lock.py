"""The lock of a run, gathered: the environment, the code, and the verifier's files."""

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
from speculators.recipe.lock import Code, Environment, Lock, VerifierLock
from speculators.recipe.plan import Plan
from speculators.recipe.values import as_tables
from speculators.training.world import World
from speculators.verifier.sources import verifier_files
from speculators.verifier.tokens import load_tokenizer

# The packages whose code has a part in the numbers; those that are not installed had none.
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
# They choose kernels, or the precision of products.
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
# They print what others computed, or hold data, which is hashed where it is used. In a wheel all are in the package.
_NO_PART = ("report/", "cli/", "recipes/", "benchmarks/")


def environment_here(world: World) -> Environment:
    """Returns where this process runs."""
    return Environment(
        packages={name: version for name in PACKAGES if (version := _version(name)) is not None},
        code=code_here(),
        python=platform.python_version(),
        system=platform.system(),
        machine=platform.machine(),
        device=world.device.type,
        device_name=_device_name(world),
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


def _device_name(world: World) -> str:
    names = [_processor()]
    if world.device.type == "cuda":
        names += [torch.cuda.get_device_name(world.device), f"CUDA {torch.version.cuda}"]
    return ", ".join(names)


def _processor() -> str:
    """Returns the processor's name; Linux tells it in a file only, other systems tell Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def code_here() -> Code:
    """Returns which code of this package runs."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        name = file.relative_to(_PACKAGE).as_posix()
        if not name.startswith(_NO_PART):
            digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
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
    """Returns the sha256 of the wheel that pip installed, where it wrote it down: not from an index, not editable."""
    told = metadata.distribution("spec-recipes").read_text("direct_url.json")
    hashes = json.loads(told).get("archive_info", {}).get("hashes", {}) if told else {}
    return hashes.get("sha256")


def verifier_lock(folder: Path, config: dict[str, Any], *, trust_remote_code: bool) -> VerifierLock:
    """Returns what a verifier's folder holds, each file hashed."""
    return VerifierLock(
        files=verifier_files(folder),
        chat_template=_template(folder, trust_remote_code=trust_remote_code),
        config=config,
    )


def _template(folder: Path, *, trust_remote_code: bool) -> str | None:
    try:
        source = ChatTemplate.of(load_tokenizer(folder, trust_remote_code=trust_remote_code)).source
    except SpeculatorsError:  # the stage that needs it says so
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def lock_of(context: Context, *, idle: bool) -> Lock:
    """Returns the lock of a run that begins or goes on, with the environments that worked on it before.

    Args:
        idle: every stage is done: this environment has no part in the result.
    """
    held, here = _held(context), environment_here(context.world)
    if held is None:
        section = context.recipe.verifier
        config = context.plan.facts.to_dict()
        verifier = verifier_lock(context.folder, config, trust_remote_code=section.trust_remote_code)
        return _lock(context.plan, verifier, here)
    lock = _lock(context.plan, held.verifier, held.environment)
    before = held.resumed_in
    last = (held.environment, *before)[-1]
    return attrs.evolve(lock, resumed_in=before if idle or here == last else (*before, here))


def _held(context: Context) -> Lock | None:
    """Returns the lock that is there, of the same verifier; None where there is none that can be read."""
    try:
        held = Lock.read(context.run_folder.path)
    except LockError:
        return None
    same = held.fingerprints.get("verifier") == context.plan.stage("verifier").fingerprint
    return held if same else None


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
