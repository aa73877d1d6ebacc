"""Plug-ins are found by entry point, validated like built-in algorithms, and refused at once if a part is missing."""

from __future__ import annotations

import itertools
import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
from command import Spec

from speculators.cli.new_algorithm import skeleton
from speculators.config import CONFIGS
from speculators.cost import sizes
from speculators.errors import RegistryError

_NAMES = (f"plugin_{number}" for number in itertools.count())


class Plugin:
    """A skeleton in its own folder, under a name that no other test has imported."""

    def __init__(self, folder: Path) -> None:
        self.name = next(_NAMES)
        self.folder = folder
        for file, text in skeleton(self.name).items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(text, encoding="utf-8")
        self.recipe = folder / f"{self.name}.toml"

    def change(self, file: str, *pairs: tuple[str, str]) -> None:
        """Replaces text in a file of the package; the text must exist."""
        path = self.folder / self.name / file
        text = path.read_text(encoding="utf-8")
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plugin:
    """A working plug-in beside its recipe."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine").mkdir()
    return Plugin(tmp_path / "mine")


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    """The command line in a folder of this test."""
    return Spec(tmp_path)


RETURNED = (
    "return unrolled.states, total, chain_metrics(total, result.right, unrolled.rows, unrolled.valid, layout.size)"
)
BROKEN = {
    "no layers": (
        [("self.layers = ", "self.blocks = "), ("in self.layers", "in self.blocks")],
        "has no attribute layers",
    ),
    "two values": ([(RETURNED, "return unrolled.states, total")], "forward returned a tuple of 2"),
    "no loss in the metrics": ([(RETURNED, "return unrolled.states, total, {}")], 'returned metrics without "loss"'),
    "a loss without gradient": (
        [("total = result.per_depth.sum()", "total = result.per_depth.sum().detach()")],
        "not a single number with a gradient",
    ),
    "kwargs that forward does not take": (
        [("        **_,\n", ""), ('"loss": kwargs["loss"]}', '"loss": kwargs["loss"], "heat": 1}')],
        "forward does not take heat",
    ),
    "an argument that nobody gives": (
        [("        depths,\n        loss,", "        depths,\n        loss,\n        heat,")],
        "wants heat",
    ),
    "training arguments that nobody takes": (
        [("(cls, verifier_config, **kwargs):", "(cls, verifier_config, loss):\n        kwargs = {}")],
        "from_training_args does not accept the arguments of its call: got an unexpected keyword argument",
    ),
    "trainer kwargs without the rest": (
        [("get_trainer_kwargs(**kwargs):", "get_trainer_kwargs(depths, loss):\n        kwargs = {}")],
        "get_trainer_kwargs does not accept the arguments of its call: got an unexpected keyword argument",
    ),
    "trainer kwargs of the batch's names": (
        [('"loss": kwargs["loss"]}', '"loss": kwargs["loss"], "input_ids": 1}')],
        "get_trainer_kwargs returns input_ids, a name of the batch",
    ),
    "a hook that wants more": (
        [("def draft(self):", "def draft(self, heat):")],
        "draft does not accept the arguments of its call",
    ),
    "metrics that are no numbers": (
        [(RETURNED, 'return unrolled.states, total, {"loss": total.detach(), "each": result.per_depth.detach()}')],
        "returned metrics that are not single numbers: each",
    ),
    "an exception in from_training_args": (
        [("ids = (verifier_config.num_hidden_layers,)", "ids = (verifier_config.num_hidden_layers + 'x',)")],
        "on a tiny verifier and on this one: TypeError: unsupported operand",
    ),
    "an exception in forward": (
        [("total = result.per_depth.sum()", "total = result.per_depth.total()")],
        "on a tiny verifier and on this one: AttributeError: 'Tensor' object has no attribute",
    ),
    "a config field without default": ([], "no default for breadth"),
    "a name registered twice": ([], "registered twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_contract_is_one_error_before_any_data(name: str, plugin: Plugin, spec: Spec) -> None:
    """The error names the class, the part and the remedy; no stage after the verifier has begun."""
    pairs, message = BROKEN[name]
    title = "".join(part.capitalize() for part in plugin.name.split("_"))
    if name == "a config field without default":
        plugin.change("config.py", ("    width: int = attrs", "    breadth: int\n    width: int = attrs"))
    elif name == "a name registered twice":
        core = plugin.folder / plugin.name / "core.py"
        core.write_text(
            core.read_text()
            + f'\n\n@SpeculatorModel.register("{plugin.name}")\nclass Other(SpeculatorModel):\n    pass\n'
        )
    else:
        plugin.change("core.py", *pairs)
    outcome = spec("run", plugin.recipe, "--runs", spec.runs)
    assert outcome.code in (1, 2), outcome.out
    errors = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, outcome.err
    assert message in errors[0]
    assert title in errors[0]
    assert "Traceback" not in outcome.err
    assert "prepare" not in outcome.err


def long_rows(plugin: Plugin, condition: str) -> None:
    """Makes a forward that fails unless `condition` is true of the row."""
    before = "        unrolled = unroll_to_places"
    plugin.change("core.py", (before, f"        assert {condition}, 'lengths'\n{before}"))


def test_a_failure_only_at_small_sizes_is_a_warning(plugin: Plugin, spec: Spec) -> None:
    """The run does not stop: the step is repeated at the run's own sizes, and both results are reported."""
    long_rows(plugin, "len(tokens) > 40")
    outcome = spec("run", plugin.recipe, "--runs", spec.runs, "--set", "schedule.max_steps=1")
    assert "failed on a tiny verifier: AssertionError: lengths" in outcome.err
    assert "succeeded: the run goes on" in outcome.err
    assert outcome.code == 0, outcome.err


def test_a_plan_without_counts_is_still_a_plan(plugin: Plugin, spec: Spec) -> None:
    """A plug-in that cannot be built without weights gives a warning; the same failure in our own code is raised."""
    plugin.change("core.py", ("model = cls(", "kwargs['verifier_name_or_path'] + ''\n        model = cls("))
    outcome = spec("plan", plugin.recipe)
    assert outcome.code == 0
    assert "warning: parameters cannot be counted: TypeError" in outcome.err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "build_model", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            spec("plan", "smoke")


def test_a_failure_in_training_is_one_error_with_the_plugins_lines(plugin: Plugin, spec: Spec) -> None:
    """The error gives the class, the exception and the plug-in's own lines, without a traceback through ours."""
    long_rows(plugin, "len(tokens) < 40")
    outcome = spec("run", plugin.recipe, "--runs", spec.runs)
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    (error,) = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert error.endswith("DraftModel failed: AssertionError: lengths")
    assert error.startswith(f"error: {plugin.name}.core.")
    (line,) = outcome.err.partition(error)[2].strip().splitlines()
    assert line.strip().startswith(f"{plugin.folder / plugin.name / 'core.py'}:")
    assert line.endswith("in forward: assert len(tokens) < 40, 'lengths'")


def test_keys_of_a_plugin_are_checked_like_built_in_ones(plugin: Plugin, spec: Spec) -> None:
    """A near miss and a value of the wrong type appear in one report."""
    text = (
        plugin.recipe.read_text()
        .replace("width            = 2", 'widht = 2\ndepths = "3"')
        .replace("depths           = 3", "")
    )
    plugin.recipe.write_text(text)
    outcome = spec("validate", plugin.recipe)
    assert outcome.code == 2
    assert "did you mean 'width'?" in outcome.err
    assert "algorithm.depths" in outcome.err


def test_changed_code_is_trained_again(plugin: Plugin, spec: Spec) -> None:
    """An edit of core.py reruns training; the data and states stay."""
    before = spec("plan", plugin.recipe, "--json").json
    plugin.change("core.py", ("nn.functional.silu", "nn.functional.gelu"))
    after = spec("plan", plugin.recipe, "--json").json
    changed = {
        one["name"]
        for one, other in zip(before["stages"], after["stages"], strict=True)
        if one["fingerprint"] != other["fingerprint"]
    }
    assert changed == {"train", "bench"}


def test_an_installed_plugin_is_found_by_its_entry_point(
    plugin: Plugin, spec: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe has no `module`: a distribution's metadata names the package."""
    info = plugin.folder / f"{plugin.name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {plugin.name.replace('_', '-')}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[speculators.models]\n{plugin.name} = {plugin.name}\n")
    monkeypatch.syspath_prepend(str(plugin.folder))
    plugin.recipe.write_text(
        "\n".join(line for line in plugin.recipe.read_text().splitlines() if not line.startswith("module"))
    )
    assert plugin.name in CONFIGS.names()
    outcome = spec("run", plugin.recipe, "--runs", spec.runs, "--json")
    assert outcome.code == 0, outcome.err
    settings = json.loads(outcome.out)["bench"]["settings"]
    assert [setting["live"]["agreement"]["gap"] for setting in settings] == [""] * len(settings)


def test_an_installed_plugin_with_the_name_of_a_built_in_algorithm_is_refused(monkeypatch):
    """A recipe's algorithm must not depend on the order of a search."""
    point = metadata.EntryPoint("medusa", "somebody.medusa", "speculators.models")
    monkeypatch.setattr("speculators.config._entry_points", lambda: {"medusa": point})
    with pytest.raises(RegistryError, match=r"'medusa' \(somebody\.medusa\)"):
        CONFIGS.names()
