"""A chat template as a recipe wants it: another file's, with arguments of its own, and on a day that does not move."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from speculators.errors import VerifierError
from speculators.recipe.input_sections import VerifierSection
from speculators.registry import near_miss

# Templates print today's date, and tokens must not depend on the day. Names are English in every locale.
FIXED_DATE = "26 Jul 2024"
_FIXED_TIME = {
    "%-d": "26", "%-m": "7", "%-H": "12", "%-I": "12", "%-M": "0", "%-S": "0", "%-y": "24", "%-j": "208",
    "%D": "07/26/24", "%F": "2024-07-26", "%T": "12:00:00", "%R": "12:00", "%r": "12:00:00 PM",
    "%c": "Fri Jul 26 12:00:00 2024", "%x": "07/26/24", "%X": "12:00:00", "%s": "1721995200",
    "%a": "Fri", "%A": "Friday", "%w": "5", "%u": "5", "%d": "26", "%e": "26", "%j": "208",
    "%b": "Jul", "%h": "Jul", "%B": "July", "%m": "07", "%y": "24", "%Y": "2024", "%C": "20",
    "%G": "2024", "%g": "24", "%V": "30", "%U": "29", "%W": "30",
    "%H": "12", "%I": "12", "%M": "00", "%S": "00", "%f": "000000", "%p": "PM", "%z": "", "%Z": "",
}  # fmt: skip


def use_template(tokenizer: Any, section: VerifierSection) -> None:
    """Gives a tokenizer the template and the arguments of a recipe, so that whatever renders with it uses them.

    Raises:
        VerifierError: the template's file cannot be read, or there are arguments that no template reads.
    """
    if section.chat_template is not None:
        tokenizer.chat_template = _read(Path(section.chat_template))
        _check_syntax(tokenizer, section.chat_template)
    if not section.template:
        return
    source = tokenizer.chat_template
    if not source:
        raise VerifierError(
            "verifier.template: the tokenizer has no chat template that could read arguments",
            hint='name one: verifier.chat_template = "./file.jinja"',
        )
    _check_read(source, section.template)
    # Some tokenizers have several templates by name, one of them for conversations with tools.
    tokenizer.chat_template = (
        {name: _with_arguments(each, section.template) for name, each in source.items()}
        if isinstance(source, dict)
        else _with_arguments(source, section.template)
    )


def on_a_fixed_day(source: str) -> str:
    """Replaces the clock that a template can read, transformers' function `strftime_now`, by a constant."""
    if "strftime_now" not in source:
        return source
    steps = "".join(f" | replace({json.dumps(code)}, {json.dumps(value)})" for code, value in _FIXED_TIME.items())
    return _before(source, f"{{% macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}")


@contextmanager
def without_chance(source: str) -> Iterator[None]:
    """Makes Jinja's `random` and `lipsum`, which draw from Python's generator, draw alike each time."""
    if not re.search(r"\b(random|lipsum)\b", source):
        yield
        return
    state = random.getstate()
    random.seed(0)
    try:
        yield
    finally:
        random.setstate(state)


def _check_read(source: str | Mapping[str, str], arguments: Mapping[str, Any]) -> None:
    """Raises VerifierError for an argument that would change nothing, such as a misspelt one."""
    sources = [source] if isinstance(source, str) else source.values()
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # transformers' own tag is unknown to Jinja.
        trees = [environment.parse(re.sub(r"{%[-+]?\s*(end)?generation\s*[-+]?%}", "", each)) for each in sources]
    except jinja2.TemplateSyntaxError:
        return  # reported where conversations are rendered
    names = set().union(*map(jinja2.meta.find_undeclared_variables, trees))
    if unread := next((name for name in arguments if name not in names), None):
        raise VerifierError(
            f"verifier.template: the chat template never reads {unread}: it would change nothing",
            hint=near_miss(unread, sorted(names)) or "leave it out, or name another template: verifier.chat_template",
        )


def _with_arguments(source: str, arguments: Mapping[str, Any]) -> str:
    # JSON is Jinja's notation, too. What a template sets at its top holds in all of it, its macros included.
    sets = "".join(f"{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}" for name, value in arguments.items())
    return _before(source, sets)


def _before(source: str, statements: str) -> str:
    # transformers renders with `trim_blocks`: the line break after a statement is not printed, and the template's own
    # first line stays at the start of a line.
    return f"{statements}\n{source}"


def _check_syntax(tokenizer: Any, file: str) -> None:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise VerifierError(f"verifier.chat_template: {file}:{error.lineno}: {error.message}") from None
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
        pass  # it may need more than a question; what it refuses is counted where conversations are rendered


def _read(file: Path) -> str:
    try:
        # A file ends with a line break that a template does not mean.
        return re.sub(r"\n\Z", "", file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise VerifierError(f"verifier.chat_template: {file} cannot be read: {error}") from None
