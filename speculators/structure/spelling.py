"""Values as a recipe spells them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any


def toml_key(key: str) -> str:
    """Spells one key of a table, in quotes where it needs them."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def toml_text(value: Any) -> str:
    """Spells a value as TOML on one line. TOML has no null: None becomes `none`, which is for messages only."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(key)} = {toml_text(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
