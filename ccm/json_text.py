"""Text and JSON in the form in which both databases store them."""

from __future__ import annotations

import json
from typing import Any

import pydantic_core


def to_json_text(value: Any) -> str:
    """Write JSON in pure ASCII: PostgreSQL's text refuses NUL and lone surrogates, and the escaped form keeps them."""
    try:
        # Three times as fast as json, and for thousands of messages in a second that counts.
        return pydantic_core.to_json(value, ensure_ascii=True).decode("ascii")
    except pydantic_core.PydanticSerializationError:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":"))  # it holds a lone surrogate


def storable(text: object) -> str | None:
    """Replace NUL and lone surrogates in a text of Claude Code's, which a database refuses. None if it is no text."""
    if not isinstance(text, str):
        return None
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\N{REPLACEMENT CHARACTER}")
