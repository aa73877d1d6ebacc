"""The verifier's tokenizer, and the tokens that end its turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
from transformers import AutoTokenizer, GenerationConfig

from speculators.errors import VerifierError
from speculators.recipe.input_sections import VerifierSection
from speculators.verifier.chat_template import use_template
from speculators.verifier.quiet import quiet

_ANSWER = "answer"


def load_tokenizer(folder: Path, section: VerifierSection | None = None) -> Any:
    """Loads the tokenizer of a Hugging Face folder, with the chat template that a recipe gives it.

    Everything that renders conversations takes its tokenizer from here, so that training data, suites, answers and
    servers see one template with the same arguments.

    Args:
        folder: of the verifier.
        section: the recipe's `[verifier]`; None for the folder as it is, without code that comes with it.

    Raises:
        VerifierError: the tokenizer or the recipe's template cannot be read.
    """
    trust = section is not None and section.trust_remote_code
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise VerifierError(f"{folder}: cannot read the tokenizer: {error}") from error
    if section is not None:
        use_template(tokenizer, section)
    return tokenizer


def stop_ids(tokenizer: Any, generation_config: Any) -> tuple[int, ...]:
    """Collects the ids that end an answer, sorted: those of the generation config, and the template's end of turn.

    A base model's files often name only the end of text; without the end of turn a chat model would write the user's
    next turn itself.

    Args:
        tokenizer: a transformers tokenizer.
        generation_config: a transformers GenerationConfig.

    Raises:
        VerifierError: no such token can be found.
    """
    eos = generation_config.eos_token_id
    tokens = {*eos} if isinstance(eos, (list, tuple)) else {eos}
    tokens |= {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    ids = tuple(sorted(int(token) for token in tokens if token is not None))
    if not ids:
        raise VerifierError("no end-of-text token in the generation config, the tokenizer or its chat template")
    return ids


def folder_stop_ids(folder: Path, section: VerifierSection | None = None) -> tuple[int, ...]:
    """Collects `stop_ids` from the files of a Hugging Face folder, without loading a model."""
    eos = None
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", eos)
    tokenizer = load_tokenizer(folder, section)
    return stop_ids(tokenizer, GenerationConfig(eos_token_id=eos))


def turn_end(tokenizer: Any) -> int | None:
    """Finds the id that ends every answer: the template's end of turn, or else the tokenizer's end of text."""
    token = end_of_turn(tokenizer)
    return tokenizer.eos_token_id if token is None else token


def end_of_turn(tokenizer: Any) -> int | None:
    """Finds the special token that the chat template puts after an assistant's answer; None if it puts none."""
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError):
        return None  # a template that refuses even this is reported where conversations are rendered
    if _ANSWER not in text:
        return None
    after = tokenizer(text[text.rindex(_ANSWER) + len(_ANSWER) :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | {int(token) for token in tokenizer.added_tokens_decoder}
    return next((token for token in after if token in special), None)
