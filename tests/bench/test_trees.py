"""Trees in a benchmark: shapes and their errors, rows of the table, the live check."""

from __future__ import annotations

import math

import attrs
import numpy as np
import pytest
from toys import ToySpeculator, train_toy

from speculators.bench.responses import own_rows
from speculators.bench.result import BenchResult
from speculators.bench.run import bench
from speculators.bench.suites import load_suite
from speculators.decoding.trees import Likely, TreeDrafter, grow
from speculators.errors import RecipeError
from speculators.recipe.schema import BenchmarkSection, Suite
from speculators.recipe.tree import parse_tree
from speculators.report.bench import bench_tables, definitions
from speculators.report.console import console
from speculators.structure.converter import structure
from speculators.verifier.engine import Engine
from speculators.verifier.weights import load_head


@pytest.mark.parametrize(
    ("name", "nodes", "depth", "width"),
    [("4x2x1", 20, 3, 4), ("1x1x1", 3, 3, 1), ("5", 5, 1, 5), ("1x3", 4, 2, 3), ("dynamic:16", 16, 7, 16)],
)
def test_a_shape_is_spelt_one_way(name, nodes, depth, width):
    """Children of each node by depth, or a number of nodes; the depth is for a largest K of 7."""
    shape = parse_tree(name)
    assert (shape.nodes, shape.depth_within(7), shape.width) == (nodes, depth, width)
    assert shape.name == name


@pytest.mark.parametrize("name", ["", "4x", "4x0", "04", "dynamic:0", "dynamic", "best:16", "4 x 2", "-1"])
def test_another_spelling_is_an_error_that_shows_both_forms(name):
    """The error names the text and the forms."""
    with pytest.raises(ValueError, match=r'no tree .* "4x2x1" .* "dynamic:16"'):
        parse_tree(name)


@pytest.mark.parametrize("name", ["8x8x8", "dynamic:600", "x".join("1" * 65)])
def test_a_tree_that_is_too_large_is_an_error(name):
    """The error says how large it is and may be."""
    with pytest.raises(ValueError, match=r"at most 512 nodes on 64 levels, it has \d+ on \d+"):
        parse_tree(name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trees": ["2x1", "2x1"]}, "must be distinct"),
        ({"trees": ["2x1"], "temperature": [1.0]}, "trees: drafted at temperature 0 only"),
        ({"trees": ["1x1x1x1"], "max_new_tokens": 3, "num_speculative_tokens": [1]}, "deeper than max_new_tokens = 3"),
    ],
)
def test_trees_that_cannot_be_measured_are_refused_with_the_recipe(values, message):
    """Nothing has been loaded by then."""
    _, problems = structure(values, BenchmarkSection, path=("benchmark",))
    assert message in "".join(map(str, problems))


def _given(likely, of):
    """Logs of the probabilities of tokens 0, 1, ... below each of `of` nodes."""
    return Likely(np.tile(np.arange(len(likely)), (of, 1)), np.tile(np.log(np.float32(likely)), (of, 1)))


def test_a_dynamic_tree_holds_the_most_likely_nodes_of_all():
    """Compared with all 39 nodes of three levels of three tokens, for every size; ties go to the smaller depth."""
    chances = [0.6, 0.3, 0.1]
    every = {(): 1.0}
    for _ in range(3):
        every |= {(*path, token): chance * chances[token] for path, chance in every.items() for token in range(3)}
    best = sorted((path for path in every if path), key=lambda path: -every[path])
    for nodes in range(1, 40):
        shape = parse_tree(f"dynamic:{nodes}")
        ids, parents = grow(_given(chances, 1), lambda rows, ids: _given(chances, len(ids)), shape, 3)
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(ids.tolist(), parents.tolist(), strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        assert len(set(paths)) == nodes
        assert sum(every[path] for path in paths) == pytest.approx(sum(every[path] for path in best[:nodes]))


class _Branches:
    """Branches of a `ToySpeculator`: g of each node, from its parent's."""

    def __init__(self, model, state):
        self.model, self.state = model, state

    def first(self):
        model = self.model
        self.g = (model.read(self.state["carry"]) + model.embed(self.state["token"])).tanh()[None]
        return model.logits(self.g)

    def below(self, parents, tokens):
        self.g = (self.model.back(self.g[parents]) + self.model.embed(tokens)).tanh()
        return self.model.logits(self.g)


class _Toy(ToySpeculator):
    """A toy whose drafter grows trees."""

    def draft(self):
        drafter = super().draft()
        drafter.draft_to_target = self.draft_to_target
        drafter.begin_tree = lambda state, num_levels: _Branches(self, state)
        return drafter


SIZES = {"state_size": 96, "vocab_size": 320, "seed": 2}
SHAPES = ("1x1x1", "8x4x1", "dynamic:6")


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """Two prompts and three trees."""
    path = tmp_path_factory.mktemp("suite") / "mine.jsonl"
    path.write_text('{"question_id": 1, "turns": ["on and on"]}\n{"question_id": 2, "turns": ["is it"]}\n')
    return BenchmarkSection(
        suites=(Suite(name="mine", path=str(path)),),
        num_speculative_tokens=(1, 3),
        temperature=(0.0, 1.0),
        max_new_tokens=24,
        live_prompts=2,
        baselines=(),
        trees=SHAPES,
    )


@pytest.fixture(scope="module")
def toy(tiny_verifier, section):
    """Fitted a little to the answers. It drafts each token after the one before: replay knows static trees only."""
    engine, model = Engine(tiny_verifier), _Toy(**SIZES)
    options = {"temperature": 0.0, "max_new_tokens": 24, "token_filter": section.token_filter}
    head = load_head(engine.folder, engine.facts)
    rows = own_rows(engine, head, load_suite(section.suites[0]), (1, 2, 4), **options)
    train_toy(model, engine.model, [row.response.tokens for row in rows], depths=3, steps=25)
    return model


@pytest.fixture(scope="module")
def result(tiny_verifier, section, toy):
    """The benchmark with trees."""
    return bench(toy, Engine(tiny_verifier), section, name="toy", seed=1)


def test_trees_have_rows_beside_the_largest_k_at_temperature_zero(result):
    """Live agrees round for round where replay knows the trees; 1x1x1 is K = 3, and a wide tree accepts more."""
    assert result.agrees
    assert [[row.name for row in setting.trees] for setting in result.settings] == [[], [*SHAPES], [], []]
    setting = result.settings[1]
    chain, wide, dynamic = setting.trees
    assert (chain.exact.tau, chain.exact.by_position) == (setting.exact.tau, setting.exact.by_position)
    assert chain.by_prompt == setting.by_prompt
    assert (wide.nodes, wide.depth, wide.exact.drafted) == (72, 3, 72.0)
    assert wide.exact.tau > 1.05 * chain.exact.tau
    for row in (chain, wide):
        assert row.live.agreement.criterion == "round for round"
        assert row.live.acceptance.tau == pytest.approx(row.exact.tau), "all prompts were decoded live"
    assert dynamic.exact is None
    assert dynamic.live.acceptance.tau > 1.0
    assert "the verifier's own tokens" in dynamic.live.agreement.criterion


def test_a_result_with_trees_reads_back_and_says_what_was_drafted(result):
    """JSON keeps the rows, the table shows the shapes in the column of K, and the definition says tree or chain."""
    read, problems = structure(result.to_json(), BenchResult)
    assert problems == []
    assert read.to_json() == result.to_json()
    assert math.isnan(read.settings[1].trees[2].live.agreement.predicted_tau)
    with console().capture() as shown:
        console().print(bench_tables(result))
    lines = shown.get().splitlines()
    assert all(any(f" {name} " in line for line in lines) for name in SHAPES)
    assert "live only" in next(line for line in lines if " dynamic:6 " in line)
    text = definitions(result.settings)
    assert "drafts: a chain, greedy" in text
    assert "T=0; drafts: a tree 1x1x1, 3 nodes on 3 levels" in text
    assert "; a tree 8x4x1, 72 nodes on 3 levels" in text
    assert "; a tree dynamic:6, the 6 nodes that the draft finds most likely, on up to 3 levels" in text


def test_a_tree_that_is_replayed_wrongly_disagrees(toy, tiny_verifier, section, monkeypatch):
    """The referee must be able to fail: the drafter leaves out the last sibling of each level."""
    narrow = parse_tree("4x2x1")
    monkeypatch.setattr("speculators.bench.run.TreeDrafter", lambda drafter, shape: TreeDrafter(drafter, narrow))
    section = attrs.evolve(section, temperature=(0.0,), trees=("8x4x1",))
    wrong = bench(toy, Engine(tiny_verifier), section, name="toy")
    assert not wrong.agrees
    assert "round" in wrong.settings[1].trees[0].live.agreement.gap


def test_a_drafter_that_grows_no_trees_is_refused(tiny_verifier, section):
    """Before anything is measured."""
    with pytest.raises(RecipeError, match=r"drafter has no begin_tree\(\)"):
        bench(ToySpeculator(**SIZES), Engine(tiny_verifier), section, name="toy")
