"""Chat templates of the kinds that published models have, written from what those templates do, for tiny verifiers.

Each is cut to what decides where an answer lies: how the prompt ends, what an answer looks like while it is the last
turn and later as history, how tools are called and answered, and which token ends a turn.
"""

# ruff: noqa: E501 - a line break in a template is printed
from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
from tokenizers import AddedToken

from speculators.verifier.tiny import make_byte_tokenizer, make_tiny_verifier

VOCAB = 384


@attrs.frozen
class Kind:
    """A chat template with the tokens that it needs.

    Attributes:
        template: Jinja.
        special: further special tokens.
        plain: further tokens that are not special, as `<think>` is in most tokenizers.
        end: the token that ends an answer.
    """

    template: str
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ("<think>", "</think>")
    end: str = "<|im_end|>"

    def tokenizer(self) -> Any:
        """Makes a tokenizer that has the template and the tokens."""
        tokenizer = make_byte_tokenizer(320)
        new = [AddedToken(token, special=True, normalized=False) for token in self.special]
        new += [AddedToken(token, special=False, normalized=False) for token in self.plain]
        tokenizer.add_tokens(new)
        tokenizer.chat_template = self.template
        tokenizer.eos_token = self.end
        return tokenizer

    def verifier(self, folder: Path) -> Path:
        """Writes a tiny verifier with this tokenizer."""
        make_tiny_verifier(folder, vocab_size=VOCAB)
        self.tokenizer().save_pretrained(folder)
        return folder


# Tools in the system turn, as Hermes has them; several results in one user turn.
_HERMES_TOOLS = """\
{% if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}# Tools
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}"""
_HERMES_CALLS = """\
{% for call in m.tool_calls or [] %}{% if not loop.first or content %}{{ '\\n' }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}"""
_HERMES_RESULTS = """\
{% elif m.role == 'tool' %}{% if loop.previtem is not defined or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}

<tool_response>
{{ m.content }}
</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>
{% endif %}"""

HERMES = Kind(
    _HERMES_TOOLS
    + """\
{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}{% set content = m.content or '' %}<|im_start|>assistant
{{ content }}"""
    + _HERMES_CALLS
    + """<|im_end|>
"""
    + _HERMES_RESULTS
    + """{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)

# After the last question of the user, answers are shown with their block of reasoning; before it, without.
_LAST_QUESTION = """\
{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"""
_SPLIT = """\
{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}{% if '</think>' in content %}\
{% set thought = content.split('</think>')[0].split('<think>')[-1] %}{% set content = content.split('</think>')[-1] %}{% endif %}"""

# An empty block of reasoning before the last answer, if it has none.
QWEN3 = Kind(
    _LAST_QUESTION
    + _HERMES_TOOLS
    + """\
{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}"""
    + _SPLIT
    + """<|im_start|>assistant
{% if loop.index0 > ns.last and (loop.last or thought) %}<think>
{{ thought.strip('\\n') }}
</think>

{{ content.lstrip('\\n') }}{% else %}{{ content.lstrip('\\n') }}{% endif %}"""
    + _HERMES_CALLS
    + """<|im_end|>
"""
    + _HERMES_RESULTS
    + """{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
)

# The prompt opens the block; arguments are written as tags.
QWEN35 = Kind(
    _LAST_QUESTION
    + _HERMES_TOOLS
    + """\
{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user
{{ m.content | trim }}<|im_end|>
{% elif m.role == 'assistant' %}"""
    + _SPLIT
    + """<|im_start|>assistant
{% if loop.index0 > ns.last %}<think>
{{ thought | trim }}
</think>

{% endif %}{{ content | trim }}{% for call in m.tool_calls or [] %}{% if content | trim or not loop.first %}{{ '\\n\\n' }}{% endif %}<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments | items %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}<|im_end|>
"""
    + _HERMES_RESULTS
    + """{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""
)

# Channels; the last answer ends with <|return|>, earlier ones with <|end|> and without their analysis; the system turn
# has the day and the effort, from a macro.
HARMONY = Kind(
    """\
{% macro system_message() %}Knowledge cutoff: 2024-06
Current date: {{ strftime_now("%Y-%m-%d") }}

Reasoning: {{ reasoning_effort }}
{% endmacro %}\
{% if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif %}\
<|start|>system<|message|>{{ system_message() }}<|end|>\
{% if messages[0].role in ['system', 'developer'] or tools %}<|start|>developer<|message|>\
{% if messages[0].role in ['system', 'developer'] %}{{ messages[0].content }}{% endif %}\
{% for tool in tools or [] %}type {{ tool.function.name }} = {{ tool.function.parameters | tojson }};{% endfor %}<|end|>{% endif %}\
{% set last_call = namespace(name=none) %}\
{% for m in messages %}{% if m.role == 'assistant' %}{% if m.tool_calls %}\
{% set later = namespace(final=false) %}{% for next in messages[loop.index:] %}\
{% if next.role == 'assistant' and not next.tool_calls %}{% set later.final = true %}{% endif %}{% endfor %}\
{% if m.content and m.thinking %}{{ raise_exception('content and thinking beside tool calls') }}\
{% elif (m.content or m.thinking) and not later.final %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>{% endif %}\
{% set call = m.tool_calls[0].function %}{% set last_call.name = call.name %}\
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>{{ call.arguments | tojson }}<|call|>\
{% elif loop.last and not add_generation_prompt %}\
{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}\
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>\
{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}\
{% elif m.role == 'tool' %}<|start|>functions.{{ last_call.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>\
{% elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}""",
    special=("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
    end="<|return|>",
)

# No end of turn: the verifier stops at the token that opens the next turn.
GLM45 = Kind(
    _LAST_QUESTION
    + """\
[gMASK]<sop>{% if tools %}<|system|>
# Tools
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>{% endif %}\
{% for m in messages %}{% if m.role == 'user' %}<|user|>
{{ m.content }}{{ '/nothink' if enable_thinking is defined and not enable_thinking }}\
{% elif m.role == 'system' %}<|system|>
{{ m.content }}\
{% elif m.role == 'assistant' %}"""
    + _SPLIT
    + """<|assistant|>
{% if loop.index0 > ns.last and thought %}<think>{{ thought.strip() }}</think>{% else %}<think></think>{% endif %}\
{% if content.strip() %}{{ '\\n' + content.strip() }}{% endif %}\
{% for call in m.tool_calls or [] %}{{ '\\n' }}<tool_call>{{ call.function.name }}
{% for key, value in call.function.arguments.items() %}<arg_key>{{ key }}</arg_key>
<arg_value>{{ value if value is string else value | tojson }}</arg_value>
{% endfor %}</tool_call>{% endfor %}\
{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|observation|>{% endif %}

<tool_response>
{{ m.content }}
</tool_response>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}{{ '\\n<think></think>' }}{% endif %}{% endif %}""",
    special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    plain=("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>"),
    end="<|user|>",
)

# Drops reasoning from every answer, opens it in every prompt; wants arguments as text.
R1 = Kind(
    """\
<|begin|>{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}\
{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}\
{% elif m.role == 'assistant' and m.tool_calls %}<|Assistant|>{{ m.content }}<|calls|>\
{% for call in m.tool_calls %}<|call|>{{ call.function.name + '\\n' + call.function.arguments }}<|end_call|>{% endfor %}<|end_calls|><|end|>\
{% elif m.role == 'assistant' %}{% set content = m.content %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}\
<|Assistant|>{{ content.lstrip('\\n') }}<|end|>\
{% elif m.role == 'tool' %}<|output|>{{ m.content }}<|end_output|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|Assistant|><think>
{% endif %}""",
    special=(
        "<|begin|>",
        "<|User|>",
        "<|Assistant|>",
        "<|calls|>",
        "<|call|>",
        "<|end_call|>",
        "<|end_calls|>",
        "<|end|>",
        "<|output|>",
        "<|end_output|>",
    ),
    end="<|end|>",
)

# Shows reasoning only in calls since the last answer; that answer itself has an empty block.
KIMI = Kind(
    """\
{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
{% if tools %}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson }}<|im_end|>{% endif %}\
{% for m in messages %}{% if m.role == 'assistant' %}<|im_assistant|>{{ m.name or m.role }}<|im_middle|>\
{% if loop.index0 > ns.last %}<think>{{ m.reasoning_content }}</think>{% else %}<think></think>{% endif %}{{ m.content }}\
{% if m.tool_calls %}<|tool_calls_section_begin|>{% for call in m.tool_calls %}<|tool_call_begin|>{{ call.id }}<|tool_call_argument_begin|>\
{{ call.function.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}\
{% elif m.role == 'tool' %}<|im_system|>{{ m.name or m.role }}<|im_middle|>## Return of {{ m.tool_call_id }}
{{ m.content }}\
{% else %}<|im_{{ m.role }}|>{{ m.name or m.role }}<|im_middle|>{{ m.content }}{% endif %}<|im_end|>{% endfor %}\
{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}""",
    special=(
        "<|im_user|>",
        "<|im_assistant|>",
        "<|im_system|>",
        "<|im_middle|>",
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
    ),
)

# Tools stand before the last question; ids of calls have nine characters.
MISTRAL = Kind(
    """\
{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}\
<s>{% for m in messages %}{% if m.role == 'user' %}\
{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]\
{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]\
{% elif m.role == 'assistant' and m.tool_calls %}[TOOL_CALLS][{% for call in m.tool_calls %}\
{% if call.id is not defined or call.id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}\
{{ (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}{% endfor %}]</s>\
{% elif m.role == 'assistant' %}{{ m.content }}</s>\
{% elif m.role == 'tool' %}\
{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}\
[TOOL_RESULTS]{{ {'content': m.content, 'call_id': m.tool_call_id} | tojson }}[/TOOL_RESULTS]{% endif %}{% endfor %}""",
    special=(
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
    ),
    end="</s>",
)

# Prints a date unless it gets one; one call a turn; results come from "ipython".
LLAMA3 = Kind(
    """\
{% if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}

{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>\
{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>\
{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call a turn') }}{% endif %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>\
{% elif m.role != 'system' %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}""",
    special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    end="<|eot_id|>",
)

# The assistant is called "model"; turns must alternate.
GEMMA = Kind(
    """\
<bos>{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
    special=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    end="<end_of_turn>",
)

# Marks what the assistant writes itself.
MARKED = Kind(
    """\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
)

KINDS = {
    "qwen3": QWEN3,
    "qwen3.5": QWEN35,
    "harmony": HARMONY,
    "glm4.5": GLM45,
    "r1": R1,
    "kimi": KIMI,
    "mistral": MISTRAL,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "hermes": HERMES,
    "marked": MARKED,
}
