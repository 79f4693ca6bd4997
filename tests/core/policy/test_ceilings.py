"""The ceilings: a run gets the lower of request and ceiling, and a request above a ceiling is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ccm.core.policy.ceilings import Ceilings
from ccm.errors import Forbidden

CEILINGS = Ceilings(max_turns=5, max_budget_usd=0.5, run_timeout=60)


@pytest.mark.parametrize(
    ("options", "lowered"),
    [
        ({}, {"maxTurns": 5, "maxBudgetUsd": 0.5}),
        ({"maxTurns": 3, "model": "x"}, {"maxTurns": 3, "maxBudgetUsd": 0.5, "model": "x"}),
        ({"maxTurns": 9, "maxBudgetUsd": 0.1}, {"maxTurns": 5, "maxBudgetUsd": 0.1}),
        (
            {"agents": {"a": {"prompt": "x"}, "b": {"maxTurns": 2}, "c": {"maxTurns": 9}}},
            {
                "agents": {"a": {"prompt": "x", "maxTurns": 5}, "b": {"maxTurns": 2}, "c": {"maxTurns": 5}},
                "maxTurns": 5,
                "maxBudgetUsd": 0.5,
            },
        ),
    ],
)
def test_a_run_gets_the_lower_of_request_and_ceiling(options: dict[str, Any], lowered: dict[str, Any]) -> None:
    assert CEILINGS.lower(options) == lowered


def test_without_ceilings_the_options_are_unchanged() -> None:
    options = {"maxTurns": 1_000_000, "agents": {"a": {"prompt": "x"}}}
    assert Ceilings().lower(options) == options
    Ceilings().check(options, 86_400_000)


def test_the_requested_options_are_not_modified() -> None:
    options = {"maxTurns": 9, "agents": {"a": {"maxTurns": 9}}}
    CEILINGS.lower(options)
    assert options == {"maxTurns": 9, "agents": {"a": {"maxTurns": 9}}}


@pytest.mark.parametrize(
    ("ceiling", "asked", "seconds", "source"),
    [
        (None, 1500, 1.5, "timeoutMs"),
        (60, None, 60, "CCM_RUN_TIMEOUT"),
        (60, 1500, 1.5, "timeoutMs"),
        (60, 60_000, 60, "timeoutMs"),
        (60, 60_001, 60, "CCM_RUN_TIMEOUT"),
        (None, None, float("inf"), ""),
    ],
)
def test_the_message_of_a_time_limit_names_its_source(
    ceiling: int | None, asked: int | None, seconds: float, source: str
) -> None:
    limit = Ceilings(run_timeout=ceiling).time_limit(asked)
    assert limit.seconds == seconds
    assert source in limit.message


@pytest.mark.parametrize(
    ("options", "timeout_ms", "field", "setting"),
    [
        ({"maxTurns": 6}, None, "options.maxTurns", "CCM_MAX_TURNS"),
        ({"maxBudgetUsd": 0.51}, None, "options.maxBudgetUsd", "CCM_MAX_BUDGET_USD"),
        ({"agents": {"a": {}, "b": {"maxTurns": 6}}}, None, "options.agents.b.maxTurns", "CCM_MAX_TURNS"),
        ({}, 60_001, "timeoutMs", "CCM_RUN_TIMEOUT"),
    ],
)
def test_a_request_above_a_ceiling_is_refused(
    options: dict[str, Any], timeout_ms: int | None, field: str, setting: str
) -> None:
    with pytest.raises(Forbidden, match=setting) as refusal:
        CEILINGS.check(options, timeout_ms)
    assert refusal.value.field == field


def test_a_request_for_exactly_a_ceiling_is_accepted() -> None:
    CEILINGS.check({"maxTurns": 5, "maxBudgetUsd": 0.5, "agents": {"a": {"maxTurns": 5}}}, 60_000)
