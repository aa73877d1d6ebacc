"""The recipe's template and arguments are in the tokenizer, so that whatever renders with it uses them."""

from __future__ import annotations

from datetime import date

import pytest
from chat_templates import KINDS

from speculators.data.messages import Message
from speculators.data.template import ChatTemplate
from speculators.errors import VerifierError
from speculators.recipe.input_sections import VerifierSection
from speculators.verifier.chat_template import _FIXED_TIME, on_a_fixed_day, use_template
from speculators.verifier.tokens import end_of_turn, load_tokenizer

QUESTION = [Message("user", "q")]


def rendered(kind: str, **keys) -> str:
    tokenizer = KINDS[kind].tokenizer()
    use_template(tokenizer, VerifierSection(model="tiny:0", **keys))
    return ChatTemplate.of(tokenizer).render(QUESTION, prompt=True)


def test_arguments_reach_every_place_of_a_template():
    """At the top level, in a macro, and of every kind that TOML has."""
    assert rendered("qwen3", template={"enable_thinking": False}).endswith("<think>\n\n</think>\n\n")
    assert rendered("qwen3", template={"enable_thinking": True}) == rendered("qwen3")
    assert "Reasoning: high\n" in rendered("harmony", template={"reasoning_effort": "high"})
    assert "Today Date: never\n" in rendered("llama3", template={"date_string": "never"})


def test_values_arrive_as_they_are_written(tmp_path):
    """Quotes, braces, line breaks, other scripts, numbers and tables are not changed on the way."""
    (tmp_path / "t.jinja").write_text("{{ a }}|{{ b.c[1] + 0.5 }}|{{ 'yes' if d is true }}")
    value = "\"'\\ %} {{ x }} é🙂\n"
    text = rendered(
        "hermes", chat_template=str(tmp_path / "t.jinja"), template={"a": value, "b": {"c": [1, -2]}, "d": True}
    )
    assert text == f"{value}|-1.5|yes"


def test_a_file_replaces_the_template(tmp_path):
    """The file's final line break is not part of the template; its first lines stay what they are."""
    (tmp_path / "t.jinja").write_text("\n  {% if x %}{% endif %}{{ messages[0].content }}\n")
    assert rendered("hermes", chat_template=str(tmp_path / "t.jinja")) == "\nq"
    assert rendered("hermes", chat_template=str(tmp_path / "t.jinja"), template={"x": 1}) == "\nq"
    with pytest.raises(VerifierError, match=r"absent\.jinja cannot be read"):
        rendered("hermes", chat_template=str(tmp_path / "absent.jinja"))


def test_the_loaded_tokenizer_has_the_recipes_template(tmp_path):
    """`load_tokenizer` is the one place: training data, suites, answers and servers take their tokenizer from it."""
    KINDS["qwen3"].tokenizer().save_pretrained(tmp_path)
    plain, fixed = load_tokenizer(tmp_path), VerifierSection(model="tiny:0", template={"enable_thinking": False})
    one, other = ChatTemplate.of(plain), ChatTemplate.of(load_tokenizer(tmp_path, fixed))
    assert one.prompt_ids(QUESTION) != other.prompt_ids(QUESTION)
    assert one.source != other.source, "a lock that hashes the template must notice the arguments"


@pytest.mark.parametrize(
    "text",
    [
        "{% set thinking = thinking | default(true) %}{{ messages }}",
        "{% macro m() %}{{ thinking }}{% endmacro %}{{ m() }}",
        "{% for m in messages %}{%- generation -%}{% if thinking is defined %}x{% endif %}{%- endgeneration -%}"
        "{% break %}{% endfor %}",
    ],
)
def test_an_argument_is_read_wherever_the_template_asks_for_it(text, tmp_path):
    """As a default that is overwritten, in a macro, in a loop, among marks, and in one of several templates."""
    (tmp_path / "t.jinja").write_text(text)
    rendered("hermes", chat_template=str(tmp_path / "t.jinja"), template={"thinking": False})
    tokenizer = KINDS["hermes"].tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": text}
    use_template(tokenizer, VerifierSection(model="tiny:0", template={"thinking": False}))
    assert set(tokenizer.chat_template) == {"default", "tool_use"}


@pytest.mark.parametrize("text", ["{{ messages }}", "{% set thinking = true %}{{ messages }}{{ thinking }}", ""])
def test_an_argument_that_the_template_never_reads_is_an_error(text, tmp_path):
    """Otherwise a misspelt switch would train on thinking that nobody wanted, without a word."""
    (tmp_path / "t.jinja").write_text(text or "{{ messages }}{{ thinking_ }}")
    with pytest.raises(
        VerifierError, match="the chat template never reads thinking: it would change nothing"
    ) as caught:
        rendered("hermes", chat_template=str(tmp_path / "t.jinja"), template={"thinking": False})
    assert ("did you mean 'thinking_'?" if not text else "leave it out") in str(caught.value)


def test_a_faulty_file_is_named_with_its_line(tmp_path):
    """A syntax error in the user's template is reported once, with file and line, before anything is rendered."""
    (tmp_path / "t.jinja").write_text("{{ messages }}\n{% if %}\n")
    with pytest.raises(VerifierError, match=r"t\.jinja:2: "):
        rendered("hermes", chat_template=str(tmp_path / "t.jinja"))


def test_a_template_that_refuses_a_plain_question_has_no_end_of_turn():
    """Where the template cannot be asked, the end of turn is that of the tokenizer's files, without a traceback."""
    tokenizer = KINDS["hermes"].tokenizer()
    for template in ("{{ raise_exception('never') }}", "{{ messages[7].content }}", "nothing", "{{ 1 + messages }}"):
        tokenizer.chat_template = template
        assert end_of_turn(tokenizer) is None


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"messages": []}, "comes from the conversation"),
        ({"two words": 1}, "letters, digits and _"),
        ({"day": date(2026, 1, 1)}, "texts, numbers, true or false"),
        ({"x": float("nan")}, "texts, numbers, true or false"),
    ],
)
def test_arguments_that_no_template_can_read_are_refused(template, said):
    """Names of the conversation's own, other names, and values without a notation are faults of the recipe."""
    with pytest.raises(ValueError, match=said):
        VerifierSection(model="tiny:0", template=template)


def test_the_fixed_day_agrees_with_the_calendar():
    """Each code gives what the 26th of July 2024, at noon, gives in English."""
    from datetime import datetime

    noon = datetime(2024, 7, 26, 12)
    local = {"%c", "%s", "%x", "%X", "%r"}  # of the locale, or of the time zone
    assert {code: text for code, text in _FIXED_TIME.items() if code not in local} == {
        code: noon.strftime(code) for code in _FIXED_TIME if code not in local
    }


def test_templates_without_a_clock_are_untouched():
    """Their text, and so its hash in locks, is what it was."""
    assert on_a_fixed_day("{{ messages }}") == "{{ messages }}"
