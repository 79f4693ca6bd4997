"""The values of a Bun database, which keeps whatever was put into a column."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

from ccm.core.claude.outcome import RESULT_ERRORS
from ccm.json_text import storable, to_json_text
from ccm.models import RunStatus
from ccm.models.fields import MONEY_DIGITS

# A number larger than this counts milliseconds and not seconds.
MILLISECONDS_FROM = 100_000_000_000


def iso_time(value: Any) -> str | None:
    """A time as ours are, in UTC with milliseconds: of ISO 8601, of SQLite's own form, or since 1970 in s or ms."""
    number = _number(value)
    try:
        if number is not None:
            seconds = number / 1000 if abs(number) >= MILLISECONDS_FROM else number
            time = datetime.fromtimestamp(0, UTC) + timedelta(seconds=seconds)
        elif isinstance(value, str):
            time = datetime.fromisoformat(value.strip())
        else:
            return None
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    return time.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _number(value: Any) -> float | None:
    """A finite number, also one that is written as a text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def whole(value: Any) -> int | None:
    """A whole number that is not negative, None if it is none."""
    number = _number(value)
    return None if number is None or not 0 <= number < MILLISECONDS_FROM * 1000 else round(number)


def text(value: Any) -> str:
    """A text, whatever it is stored as; empty for NULL."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def parsed(text: Any) -> Any:
    """What a text says, None if it is no JSON."""
    try:
        value = json.loads(text)
        to_json_text(value)
    except (TypeError, ValueError, RecursionError):
        return None
    return value


def total(result: dict[str, Any] | None) -> float | None:
    """What a result says that its run cost, with all that it continued (USD)."""
    total = (result or {}).get("total_cost_usd")
    return None if isinstance(total, bool | str) else _number(total)


def own_cost(total: float | None, before: float | None) -> float | None:
    """What a run alone cost that continued another: the totals tell, if both are known."""
    if total is None or before is None or total < before:
        return None
    return round(total - before, MONEY_DIGITS)


def error(status: str, told: Any, result: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Code and sentence of why a run failed.

    Args:
        told: the status that it had there.
    """
    if status != RunStatus.ERROR:
        return None, None
    if told != RunStatus.ERROR:
        return "EXECUTION_ERROR", storable(f"The original service left this run in the status {told!r}.")
    subtype = str((result or {}).get("subtype"))
    said = (result or {}).get("result") or "The original service recorded that this run failed, and not why."
    return RESULT_ERRORS.get(subtype, "EXECUTION_ERROR"), storable(str(said))


def later(at: str, milliseconds: int) -> str:
    """A time so many milliseconds after another."""
    return iso_time((datetime.fromisoformat(at) + timedelta(milliseconds=milliseconds)).isoformat()) or at
