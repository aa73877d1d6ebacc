"""The shipped `smoke` recipe run once through the command line, for all tests of the pipeline to look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import Spec, Told


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Spec:
    """The command line with a cache and a runs folder that all tests here share."""
    return Spec(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def smoke(spec: Spec) -> Told:
    """What the first `spec run smoke` said."""
    told = spec("run", "smoke", "--runs", spec.runs)
    assert told.code == 0, told.err
    return told


@pytest.fixture(scope="session")
def run_folder(spec: Spec, smoke: Told) -> Path:
    """The run folder that it made."""
    (folder,) = spec.runs.glob("smoke-*")
    return folder


@pytest.fixture
def fresh(tmp_path: Path) -> Spec:
    """The command line with folders of its own."""
    return Spec(tmp_path)


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """A re-run takes over its lock's number of threads: the tests after it get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kept(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run of smoke, for `spec reproduce`; read only."""
    return Path(shutil.copytree(run_folder, tmp_path_factory.mktemp("kept") / run_folder.name))


@pytest.fixture(scope="session")
def to(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its re-run, which is made once: a second call goes on from what is there, which is all."""
    return tmp_path_factory.mktemp("again") / "to"


@pytest.fixture(scope="session")
def first(spec: Spec, kept: Path, to: Path) -> Told:
    """What the first `spec reproduce` said; what it wrote is kept beside, since later ones write it anew."""
    told = spec("reproduce", kept, "--to", to, "--json")
    shutil.copyfile(to / "reproduction.json", to.with_name("first.json"))
    return told


@pytest.fixture
def run(kept: Path, tmp_path: Path, first: Told) -> Path:
    """A copy of the run to tamper with."""
    return Path(shutil.copytree(kept, tmp_path / kept.name))
