"""What the results of a run say: why it failed, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ccm.models import RunStatus
from ccm.models.fields import MONEY_DIGITS

RESULT_ERRORS = {
    "error_max_turns": "MAX_TURNS_REACHED",
    "error_max_budget_usd": "MAX_BUDGET_REACHED",
    "error_max_structured_output_retries": "STRUCTURED_OUTPUT_FAILED",
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: RunStatus
    error_code: str | None = None
    error_message: str | None = None
    result: Mapping[str, Any] | None = None
    cost_usd: float | None = None
    duration_ms: int | None = None


def cost(results: Sequence[Mapping[str, Any]], *, fresh: bool) -> float | None:
    """What the run alone cost (USD), None if it is not known: the SDK's total counts the resumed history too."""
    if not results:
        return None
    since = [result.get("model_usage_since_last_result") for result in results]
    if all(isinstance(usage, dict) for usage in since):
        models = [model for usage in since if usage for model in usage.values()]
        costs = [_money(model.get("costUSD")) for model in models if isinstance(model, dict)]
        return _money(sum(amount for amount in costs if amount is not None))
    return _money(results[-1].get("total_cost_usd")) if fresh else None


def _money(amount: object) -> float | None:
    """Rounded; None if it is no amount."""
    if not isinstance(amount, int | float) or not math.isfinite(amount):
        return None
    return round(float(amount), MONEY_DIGITS)


def error_code(result: Mapping[str, Any], api_error: str | None) -> str:
    """Why a result is an error.

    Args:
        api_error: what the last assistant message of the main thread reports as an error of the API.
    """
    if result.get("api_error_status") == 401 or api_error == "authentication_failed":
        return "AUTHENTICATION_FAILED"
    if result.get("terminal_reason") == "api_error" or result.get("api_error_status") is not None:
        return "API_ERROR"
    return RESULT_ERRORS.get(str(result.get("subtype")), "EXECUTION_ERROR")


def error_text(result: Mapping[str, Any]) -> str:
    """What an error says of itself."""
    errors = [str(error) for error in result.get("errors") or []]
    return "; ".join(errors) or str(result.get("result") or result.get("subtype") or "The run failed.")
