"""The shipped `smoke` recipe run once through the command line, for all tests of the pipeline to look at."""

from __future__ import annotations

from pathlib import Path

import pytest
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
