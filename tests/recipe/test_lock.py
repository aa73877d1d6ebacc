"""The lock as a value: it restores a recipe exactly, and knows which differences of environments can matter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest

from speculators.facts import VerifierFacts
from speculators.recipe.catalog import recipe_names
from speculators.recipe.fingerprint import fingerprint
from speculators.recipe.load import load_recipe
from speculators.recipe.lock import Code, Environment, Lock, VerifierLock, differences
from speculators.recipe.plan import make_plan
from speculators.recipe.values import as_tables

HERE = Environment(
    packages={"torch": "2.13.0", "spec-recipes": "0.1.0"},
    code=Code(version="0.1.0", commit="a" * 40, dirty=False, sources="b" * 64),
    python="3.11.7",
    system="Linux",
    machine="x86_64",
    device="cpu",
    device_name="a processor",
    cpu_capability="AVX2",
    bf16_products=False,
    threads=2,
    world_size=1,
    variables={},
)


def lock_of(recipe: Any) -> Lock:
    return Lock(
        recipe=as_tables(recipe),
        verifier=VerifierLock(files={}, config={}),
        fingerprints=dict.fromkeys(("verifier", "prepare", "train"), fingerprint({})),
        inputs={"verifier": {}, "prepare": {}, "train": {}},
        seed=0,
        dtypes={},
        environment=HERE,
    )


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_comes_back_from_its_lock_as_it_was(name: str, tmp_path: Path) -> None:
    """Through JSON and the strict converter: every value, defaults and absences included."""
    recipe = load_recipe(name)
    (tmp_path / "lock.json").write_text(json.dumps(lock_of(recipe).to_json()))
    restored = Lock.read(tmp_path).resolved(tmp_path)
    assert restored == recipe
    assert as_tables(restored) == as_tables(recipe)


def test_a_lock_that_names_a_single_server_is_still_read(tmp_path: Path) -> None:
    """Earlier runs have `data.server.endpoint` in their locks, where it is now a list."""
    lock = lock_of(load_recipe("smoke")).to_json()
    server = lock["recipe"]["data"]["server"]
    server["endpoint"], *_ = server.pop("endpoints")
    (tmp_path / "lock.json").write_text(json.dumps(lock))
    assert Lock.read(tmp_path).resolved(tmp_path) == load_recipe("smoke")


@pytest.mark.parametrize(
    ("change", "key", "matters"),
    [
        ({"threads": 1}, "threads", True),
        ({"world_size": 2}, "world_size", True),
        ({"device": "cuda"}, "device", True),
        ({"device_name": "another processor"}, "device_name", True),
        ({"cpu_capability": "AVX512"}, "cpu_capability", True),
        ({"bf16_products": True}, "bf16_products", True),
        ({"packages": {"torch": "2.13.1", "spec-recipes": "0.1.0"}}, "packages.torch", True),
        ({"packages": {"torch": "2.13.0", "spec-recipes": "0.1.1"}}, "packages.spec-recipes", False),
        ({"variables": {"MKL_CBWR": "COMPATIBLE"}}, "variables.MKL_CBWR", True),
        ({"python": "3.12.0"}, "python", True),
        ({"python": "3.11.9"}, "python", False),
        ({"code": attrs.evolve(HERE.code, sources="c" * 64)}, "code.sources", True),
        ({"code": attrs.evolve(HERE.code, commit="c" * 40)}, "code.commit", False),
        ({"code": attrs.evolve(HERE.code, dirty=True)}, "code.dirty", False),
    ],
)
def test_a_difference_says_whether_it_can_matter(change: dict[str, Any], key: str, matters: bool) -> None:
    """Each with its path in the lock, both values and the reason."""
    (restored,) = differences(HERE, attrs.evolve(HERE, **change))
    assert (restored.key, restored.matters) == (key, matters)
    assert restored.locked != restored.current
    assert restored.why


def test_equal_environments_differ_in_nothing() -> None:
    """No difference is reported."""
    assert differences(HERE, attrs.evolve(HERE)) == []


def test_the_tolerance_changes_no_fingerprint(llama: VerifierFacts) -> None:
    """It decides how a re-run is judged, not what is computed; its bounds are checked."""
    name = "eagle3_llama8b"
    plain, loose = (load_recipe(name, sets) for sets in ((), ("reproduce.tolerance=0.5",)))
    assert loose.reproduce.tolerance == 0.5
    assert make_plan(plain, llama).inputs() == make_plan(loose, llama).inputs()
    with pytest.raises(Exception, match=r"reproduce.tolerance: must be from 0 to 1"):
        load_recipe(name, ("reproduce.tolerance=2",))
