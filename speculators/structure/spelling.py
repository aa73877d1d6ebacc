"""Values as a recipe spells them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def toml_text(value: Any) -> str:
    """Spells a value as TOML on one line. TOML has no null: None becomes `none`, which is for messages only."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {toml_text(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
