"""Derives from a run's messages whether it failed, why, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ccm.models import Answer, RunErrorCode, RunStatus
from ccm.models.fields import MONEY_DIGITS

RESULT_ERRORS = {
    "error_max_turns": RunErrorCode.MAX_TURNS_REACHED,
    "error_max_budget_usd": RunErrorCode.MAX_BUDGET_REACHED,
    "error_max_structured_output_retries": RunErrorCode.STRUCTURED_OUTPUT_FAILED,
}
# Claude Code retries a refused login for three minutes. Two refusals in a row are enough to know.
LOGIN_REFUSALS = 2
LOGIN_ADVICE = (
    "Claude Code has no valid login. Log in again: run "
    ".venv/lib/python3*/site-packages/claude_agent_sdk/_bundled/claude and /login as the service's user, or set "
    "ANTHROPIC_API_KEY for the service."
)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: RunStatus
    error_code: RunErrorCode | None = None
    error_message: str | None = None
    result: Mapping[str, Any] | None = None
    cost_usd: float | None = None
    duration_ms: int | None = None


def fault(error: BaseException) -> Outcome:
    """Return the outcome of a run that failed because of a fault of the service."""
    return Outcome(RunStatus.ERROR, RunErrorCode.EXECUTION_ERROR, f"{type(error).__name__}: {error}")


class Progress:
    """The state of a run, collected from its messages so far. For the run's own event loop."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []
        # The number of results when the run was asked to stop; None before that.
        self._results_before_stop: int | None = None
        # The last state that Claude Code has reported; None if it reports none, like older versions.
        self._session_state: str | None = None
        self._login_refusals = 0
        # The API error that the last assistant message of the main thread reports.
        self._api_error: str | None = None
        # The answer that interrupts the current turn, and the one that ended the last turn.
        self._denial: Answer | None = None
        self._denied: Answer | None = None

    @property
    def idle(self) -> bool:
        """Whether Claude Code has given a result and is not working."""
        return bool(self.results) and self._session_state in (None, "idle")

    @property
    def reports_idle(self) -> bool:
        return self._session_state == "idle"

    @property
    def login_refused(self) -> bool:
        """Whether the login was refused so often in a row that waiting is pointless."""
        return self._login_refusals >= LOGIN_REFUSALS

    def note(self, message: Mapping[str, Any]) -> None:
        """Update the state from a message."""
        kind, subtype = message.get("type"), message.get("subtype")
        if kind == "result":
            self.results.append(dict(message))
            self._denied, self._denial = self._denial, None
        elif kind == "system" and subtype == "session_state_changed":
            self._session_state = message.get("state")
        elif kind == "system" and subtype == "api_retry" and message.get("error_status") == 401:
            self._login_refusals += 1
        elif kind in ("assistant", "stream_event"):
            if not message.get("error"):
                self._login_refusals = 0  # the login was refreshed
            if kind == "assistant" and message.get("parent_tool_use_id") is None:
                self._api_error = message.get("error")

    def note_stop(self) -> None:
        """Remember how many results there were when the run was asked to stop."""
        self._results_before_stop = len(self.results)

    def note_denial(self, answer: Answer) -> None:
        """Remember the answer to an approval that interrupts the turn."""
        self._denial = answer

    def outcome(self, reason: Outcome | None, *, over: bool, unanswered: bool) -> Outcome | None:
        """Return how the run ended, or None if its messages do not say. A result takes precedence over how the
        process ended.

        Args:
            reason: the outcome with which the run was asked to stop, if it was.
            over: whether Claude Code has done everything that it was asked to do.
            unanswered: whether Claude Code accepted a follow-up and did not complete it.
        """
        if reason is not None and self._results_before_stop is not None:
            since = self.results[self._results_before_stop :]
            # A turn that completed despite the stop completes the run, unless a message was still unanswered.
            if not since or unanswered or any(result.get("is_error") for result in since):
                return reason
        if not (over and self.results):
            return reason
        result = self.results[-1]
        if not result.get("is_error"):
            return Outcome(RunStatus.COMPLETED)
        if reason is not None:
            return reason
        if self._denied is not None:
            return Outcome(
                RunStatus.ERROR,
                RunErrorCode.APPROVAL_DENIED,
                f"An approval was denied with interrupt: {self._denied.message}",
            )
        code, text = error_code(result, self._api_error), error_text(result)
        if code == RunErrorCode.AUTHENTICATION_FAILED:
            text += f" {LOGIN_ADVICE}" if text.endswith((".", "!", "?")) else f". {LOGIN_ADVICE}"
        return Outcome(RunStatus.ERROR, code, text)


def cost(results: Sequence[Mapping[str, Any]], *, fresh: bool) -> float | None:
    """Return the cost of the run alone (USD), or None if unknown: the SDK's total includes the resumed history."""
    if not results:
        return None
    since = [result.get("model_usage_since_last_result") for result in results]
    if all(isinstance(usage, dict) for usage in since):
        models = [model for usage in since if usage for model in usage.values()]
        costs = [_money(model.get("costUSD")) for model in models if isinstance(model, dict)]
        return _money(sum(amount for amount in costs if amount is not None))
    return _money(results[-1].get("total_cost_usd")) if fresh else None


def _money(amount: object) -> float | None:
    """Return an amount rounded, or None if it is not a finite number."""
    if not isinstance(amount, int | float) or not math.isfinite(amount):
        return None
    return round(float(amount), MONEY_DIGITS)


def error_code(result: Mapping[str, Any], api_error: str | None) -> RunErrorCode:
    """Return the error code of a failed result.

    Args:
        api_error: the API error in the last assistant message of the main thread, if any.
    """
    if result.get("api_error_status") == 401 or api_error == "authentication_failed":
        return RunErrorCode.AUTHENTICATION_FAILED
    if result.get("terminal_reason") == "api_error" or result.get("api_error_status") is not None:
        return RunErrorCode.API_ERROR
    return RESULT_ERRORS.get(str(result.get("subtype")), RunErrorCode.EXECUTION_ERROR)


def error_text(result: Mapping[str, Any]) -> str:
    """Return the message of a failed result."""
    errors = [str(error) for error in result.get("errors") or []]
    return "; ".join(errors) or str(result.get("result") or result.get("subtype") or "The run failed.")
