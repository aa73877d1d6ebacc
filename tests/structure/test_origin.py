"""The scan for the lines of keys is not fooled by values."""

from __future__ import annotations

import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators.structure.origin import key_lines, nearest_line, path_text

TEXT = '''\
name = "x"   # seed = 3

[data]
sources = [
    { path = "a" },   # [fake]
    { path = "b = [" },
]
summary = """
max_tokens = 4
[schedule]
"""
max_tokens = 5
nested.deep."a key" = 1

[[suite]]
name = "first"

[[suite]]
name = "second"
[suite.more]
k = 1

[expect."a/K=5/T=0"]
tau = [1.0, 2.0]
'''


def test_each_key_has_the_line_it_is_written_in() -> None:
    """Comments, multi-line strings and multi-line lists do not count as keys."""
    assert tomli.loads(TEXT)["data"]["max_tokens"] == 5
    assert key_lines(TEXT) == {
        ("name",): 1,
        ("data",): 3,
        ("data", "sources"): 4,
        ("data", "summary"): 8,
        ("data", "max_tokens"): 12,
        ("data", "nested", "deep", "a key"): 13,
        ("suite", 0): 15,
        ("suite", 0, "name"): 16,
        ("suite", 1): 18,
        ("suite", 1, "name"): 19,
        ("suite", 1, "more"): 20,
        ("suite", 1, "more", "k"): 21,
        ("expect", "a/K=5/T=0"): 23,
        ("expect", "a/K=5/T=0", "tau"): 24,
    }


def test_a_key_inside_an_inline_value_has_the_line_of_the_key_around_it() -> None:
    """A key inside an inline value has the line of the nearest table or key around it."""
    lines = key_lines(TEXT)
    assert nearest_line(lines, ("data", "sources", 1, "path")) == 4
    assert nearest_line(lines, ("data", "missing")) == 3
    assert nearest_line(lines, ("missing",)) is None


def test_a_path_reads_as_toml() -> None:
    """Keys that are not bare are quoted; indices stand in brackets."""
    assert path_text(("data", "sources", 1, "path")) == "data.sources[1].path"
    assert path_text(("expect", "a/K=5", "tau")) == 'expect."a/K=5".tau'


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(alphabet="[]{}\"'#=a. \n\\", max_size=60))
def test_the_scan_accepts_every_text_that_toml_accepts(text: str) -> None:
    """A valid recipe never fails for want of a line number."""
    try:
        tomli.loads(text)
    except tomli.TOMLDecodeError:
        return
    assert all(1 <= line <= text.count("\n") + 1 for line in key_lines(text).values())
