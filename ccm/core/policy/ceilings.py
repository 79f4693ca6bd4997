"""The operator's ceilings for turns, budget and time. A request may lower a ceiling but not raise it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ccm.errors import Forbidden, OptionForbidden, TimeoutForbidden

# The setting of each ceiling, by the field that it limits.
CEILINGS = {
    "options.maxTurns": "CCM_MAX_TURNS",
    "options.maxBudgetUsd": "CCM_MAX_BUDGET_USD",
    "timeoutMs": "CCM_RUN_TIMEOUT",
}


@dataclass(frozen=True)
class TimeLimit:
    """The time limit of a run (seconds), and the error message of a run that exceeds it."""

    seconds: float
    message: str


@dataclass(frozen=True)
class Ceilings:
    """The operator's ceilings; None for no ceiling.

    Args:
        max_turns: for a run, and for each agent that its request defines: Claude Code counts an agent's turns apart.
        max_budget_usd: for the run alone; Claude Code does not count the cost of the resumed history.
        run_timeout: seconds.
    """

    max_turns: int | None = None
    max_budget_usd: float | None = None
    run_timeout: int | None = None

    def check(self, options: Mapping[str, Any], timeout_ms: int | None) -> None:
        """Check that a request exceeds no ceiling.

        Raises:
            OptionForbidden, TimeoutForbidden: the error names the setting of the exceeded ceiling.
        """
        turns = [("options.maxTurns", options.get("maxTurns"))]
        for name, agent in options.get("agents", {}).items():
            turns.append((f"options.agents.{name}.maxTurns", agent.get("maxTurns")))
        for field, requested in turns:
            _check(field, requested, self.max_turns, CEILINGS["options.maxTurns"], OptionForbidden)
        field, budget = "options.maxBudgetUsd", options.get("maxBudgetUsd")
        _check(field, budget, self.max_budget_usd, CEILINGS[field], OptionForbidden)
        milliseconds = None if self.run_timeout is None else self.run_timeout * 1000
        _check("timeoutMs", timeout_ms, milliseconds, CEILINGS["timeoutMs"], TimeoutForbidden)

    def lower(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options with each ceiling applied: the lower of the requested value and the ceiling."""
        lowered = dict(options)
        for name, ceiling in (("maxTurns", self.max_turns), ("maxBudgetUsd", self.max_budget_usd)):
            if ceiling is not None:
                lowered[name] = min(options.get(name, ceiling), ceiling)
        ceiling = self.max_turns
        if ceiling is not None and "agents" in options:
            lowered["agents"] = {
                name: {**agent, "maxTurns": min(agent.get("maxTurns", ceiling), ceiling)}
                for name, agent in options["agents"].items()
            }
        return lowered

    def time_limit(self, timeout_ms: int | None) -> TimeLimit:
        """Return the time limit of a run: the lower of the requested limit and the ceiling.

        Args:
            timeout_ms: the requested limit, if any.
        """
        requested = math.inf if timeout_ms is None else timeout_ms / 1000
        allowed = math.inf if self.run_timeout is None else self.run_timeout
        if requested <= allowed:
            limit = f"{timeout_ms} ms, which its request set as timeoutMs"
        else:
            limit = f"{self.run_timeout} s, which CCM_RUN_TIMEOUT sets for every run"
        message = f"The run was stopped because it took longer than {limit}. Resume or fork its session to continue."
        return TimeLimit(min(requested, allowed), message)


def _check(field: str, requested: float | None, ceiling: float | None, setting: str, refusal: type[Forbidden]) -> None:
    if requested is not None and ceiling is not None and requested > ceiling:
        raise refusal(
            f"{field}: {requested} exceeds {ceiling}, the ceiling that {setting} sets. Request that or less, or leave "
            "it out.",
            field=field,
        )
