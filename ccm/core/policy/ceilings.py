"""What a run may use up at the most. A request may lower each ceiling and raise none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ccm.errors import Forbidden, OptionForbidden, TimeoutForbidden


@dataclass(frozen=True)
class TimeLimit:
    """How long a run may take (seconds), and what is said of one that takes longer."""

    seconds: float
    message: str


@dataclass(frozen=True)
class Ceilings:
    """
    Args:
        max_turns: of a run, and of each agent that its request defines: Claude Code counts an agent's turns apart.
        max_budget_usd: for the run alone; Claude Code does not count what the resumed history has cost.
        run_timeout: seconds.
    """

    max_turns: int | None = None
    max_budget_usd: float | None = None
    run_timeout: int | None = None

    def check(self, options: Mapping[str, Any], timeout_ms: int | None) -> None:
        """
        Raises:
            OptionForbidden, TimeoutForbidden: above a ceiling; names its setting.
        """
        turns = [("options.maxTurns", options.get("maxTurns"))]
        for name, agent in options.get("agents", {}).items():
            turns.append((f"options.agents.{name}.maxTurns", agent.get("maxTurns")))
        for field, asked in turns:
            _check(field, asked, self.max_turns, "CCM_MAX_TURNS", OptionForbidden)
        budget = options.get("maxBudgetUsd")
        _check("options.maxBudgetUsd", budget, self.max_budget_usd, "CCM_MAX_BUDGET_USD", OptionForbidden)
        milliseconds = None if self.run_timeout is None else self.run_timeout * 1000
        _check("timeoutMs", timeout_ms, milliseconds, "CCM_RUN_TIMEOUT", TimeoutForbidden)

    def lower(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that a run is made with: of what was asked and what is allowed, the lower."""
        lowered = dict(options)
        for name, ceiling in (("maxTurns", self.max_turns), ("maxBudgetUsd", self.max_budget_usd)):
            if ceiling is not None:
                lowered[name] = min(options.get(name, ceiling), ceiling)
        if self.max_turns is not None and "agents" in options:
            lowered["agents"] = dict(self._agents(options["agents"], self.max_turns))
        return lowered

    def _agents(self, agents: Mapping[str, Any], ceiling: int) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, agent in agents.items():
            yield name, {**agent, "maxTurns": min(agent.get("maxTurns", ceiling), ceiling)}

    def time_limit(self, timeout_ms: int | None) -> TimeLimit:
        """The time limit of a run: of what was asked and what is allowed, the lower.

        Args:
            timeout_ms: what its request asked for, if anything.
        """
        asked = math.inf if timeout_ms is None else timeout_ms / 1000
        allowed = math.inf if self.run_timeout is None else self.run_timeout
        if asked <= allowed:
            limit = f"{timeout_ms} ms, which its request set as timeoutMs"
        else:
            limit = f"{self.run_timeout} s, which CCM_RUN_TIMEOUT sets for every run"
        message = f"The run was stopped because it took longer than {limit}. Resume or fork its session to go on."
        return TimeLimit(min(asked, allowed), message)


def _check(field: str, asked: float | None, ceiling: float | None, setting: str, refusal: type[Forbidden]) -> None:
    if asked is not None and ceiling is not None and asked > ceiling:
        raise refusal(
            f"{field}: {asked} is more than {ceiling}, the ceiling that {setting} sets. Ask for that or less, or leave "
            "it out.",
            field=field,
        )
