"""Timestamps in the format of the database and the API."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from functools import lru_cache


def timestamp(ahead: float = 0.0) -> str:
    """Return the time `ahead` seconds from now as ISO 8601 in UTC with milliseconds, which sorts as text."""
    seconds, milliseconds = divmod(time.time_ns() // 1_000_000 + round(ahead * 1_000), 1_000)
    return f"{_second(seconds)}.{milliseconds:03}Z"


def timestamp_of(text: str) -> str:
    """Return a date or a time of ISO 8601 in the format of `timestamp`. Without an offset it is in UTC.

    Raises:
        ValueError: the text is neither.
    """
    try:
        at = datetime.fromisoformat(text)
        at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{text} is out of range") from None
    return at.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().removesuffix("+00:00")
