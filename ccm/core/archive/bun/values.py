"""Converts the values of a Bun database, whose columns may hold values of any type."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta
from typing import Any

from ccm.core.claude.outcome import RESULT_ERRORS
from ccm.json_text import storable, to_json_text
from ccm.models import RunErrorCode, RunStatus
from ccm.models.fields import MONEY_DIGITS

# From this number on, a time is in milliseconds and not in seconds.
MILLISECONDS_FROM = 100_000_000_000


def iso_time(value: Any) -> str | None:
    """Return a time in UTC with milliseconds, from ISO 8601, SQLite's own format, or s or ms since 1970."""
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
    """Return a finite number, also from text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def whole(value: Any) -> int | None:
    """Return a non-negative whole number, None for anything else."""
    number = _number(value)
    return None if number is None or not 0 <= number < MILLISECONDS_FROM * 1000 else round(number)


def text(value: Any) -> str:
    """Return a value as text, empty for NULL."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def parsed(text: Any) -> Any:
    """Return the value of JSON text, None if it is invalid or cannot be stored."""
    try:
        value = json.loads(text)
        to_json_text(value)
    except (TypeError, ValueError, RecursionError):
        return None
    return value


def total(result: dict[str, Any] | None) -> float | None:
    """Return the cost in a result (USD), which includes the runs that it continued."""
    total = (result or {}).get("total_cost_usd")
    return None if isinstance(total, bool | str) else _number(total)


def own_cost(total: float | None, before: float | None) -> float | None:
    """Return the cost of a continued run alone, from both totals. None if one is unknown."""
    if total is None or before is None or total < before:
        return None
    return round(total - before, MONEY_DIGITS)


def error(status: str, stored: Any, result: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Return the error code and message of a run, None for both if it did not fail.

    Args:
        status: its status here.
        stored: its status in the original service.
    """
    if status != RunStatus.ERROR:
        return None, None
    if stored != RunStatus.ERROR:
        return RunErrorCode.EXECUTION_ERROR, storable(f"The original service left this run in the status {stored!r}.")
    subtype = str((result or {}).get("subtype"))
    message = (result or {}).get("result") or "The original service recorded that this run failed, and not why."
    return RESULT_ERRORS.get(subtype, RunErrorCode.EXECUTION_ERROR), storable(str(message))


def later(at: str, milliseconds: int) -> str:
    """Return a time plus milliseconds."""
    return iso_time((datetime.fromisoformat(at) + timedelta(milliseconds=milliseconds)).isoformat()) or at
