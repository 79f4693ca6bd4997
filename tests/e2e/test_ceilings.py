"""Ceilings with the real Claude Code: they stop it in every state, and the run can be continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.processes import marked
from ccm.testing.messages_api import MessagesAPI
from tests.client import Client
from tests.conftest import ServeFunction

LIST = '[[tool Bash {"command": "ls"}]] '
SLEEPING_TOOL = '[[tool Bash {"command": "perl -e \'sleep 300\'"}]]'
BASH: dict[str, Any] = {"options": {"allowedTools": ["Bash"]}}


@pytest.mark.parametrize(
    ("prompt", "terminal_reason"),
    [
        (SLEEPING_TOOL, "aborted_tools"),
        ("[[slow 2000 0.02]]", "aborted_streaming"),
        ("[[stall]]", "aborted_streaming"),
        ("[[hang]]", "aborted_streaming"),
        ("[[status 500]]", "aborted_streaming"),
    ],
    ids=["a tool runs", "streaming", "stalled", "no byte yet", "retrying"],
)
def test_a_run_over_its_time_limit_is_stopped_and_can_be_continued(
    client: Client, project: Path, prompt: str, terminal_reason: str
) -> None:
    run = client.start(project, prompt, timeoutMs=4_000, **BASH)

    assert [run["status"], run["error"]["code"], run["timeoutMs"]] == ["error", "TIMEOUT", 4_000]
    assert "4000 ms" in run["error"]["message"]
    assert run["result"]["terminal_reason"] == terminal_reason
    assert 3_000 < run["durationMs"] < 20_000
    assert marked(run["id"]) == []
    assert client.messages(run["id"])[-1] == run["result"]

    again = client.resume(run["sessionId"], "Go on.")
    assert [again["status"], again["parentRunId"]] == ["completed", run["id"]]


def test_a_run_with_a_minimal_time_limit_is_stopped_while_it_connects(client: Client, project: Path) -> None:
    run = client.start(project, "Hello.", timeoutMs=1)

    assert [run["status"], run["error"]["code"], run["messageCount"]] == ["error", "TIMEOUT", 0]
    assert marked(run["id"]) == []


def test_the_services_ceiling_on_turns_applies_to_the_run_and_to_its_agents(
    serve: ServeFunction, messages_api: MessagesAPI, project: Path
) -> None:
    client = Client(serve(CCM_MAX_TURNS=2).url)
    run = client.start(project, LIST * 5 + "[[text Done.]]", **BASH)
    assert [run["error"]["code"], run["options"]] == ["MAX_TURNS_REACHED", BASH["options"]]

    # Claude Code counts the turns of an agent separately from those of the run.
    task = {"description": "Lists.", "prompt": "As an agent: " + LIST * 5 + "[[text Listed.]]", "subagent_type": "poet"}
    agents = {"poet": {"description": "Writes poems.", "prompt": "You are a poet.", "background": False}}
    begun = len(messages_api.requests)
    client.start(project, f"[[tool Agent {json.dumps(task)}]] [[text Done.]]", options={"agents": agents})
    sent = [messages_api.prompts(request)[-1:] for request in messages_api.requests[begun:]]
    assert len([prompts for prompts in sent if prompts and prompts[0].startswith("As an agent")]) == 2


def test_the_budget_does_not_count_the_cost_of_earlier_runs(client: Client, project: Path) -> None:
    first = client.start(project, "Hello.")
    budget = first["costUsd"] * 1.5

    def resume(prompt: str) -> dict[str, Any]:
        return client.resume(first["sessionId"], prompt, options={**BASH["options"], "maxBudgetUsd": budget})

    second = resume("And again.")
    assert [second["status"], second["result"]["total_cost_usd"] > budget] == ["completed", True]
    third = resume("And again.")
    assert [third["status"], third["result"]["total_cost_usd"] > 2 * budget] == ["completed", True]
    fourth = resume(LIST * 3)
    assert [fourth["status"], fourth["error"]["code"]] == ["error", "MAX_BUDGET_REACHED"]
    assert client.resume(first["sessionId"], "Without a limit.")["status"] == "completed"
