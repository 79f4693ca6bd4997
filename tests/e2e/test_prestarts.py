"""Runs that use a Claude Code which was started in advance: a spare for a start, a warm one for a resume or fork."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ccm.api.http.options_body import Options
from ccm.core.claude import prestart_key
from ccm.core.claude.locations import transcript_path
from ccm.core.claude.processes import marked
from ccm.testing.messages_api import MessagesAPI
from ccm.testing.service_process import ServiceProcess
from tests.client import Client
from tests.conftest import ServeFunction
from tests.waiting import until

# What differs between any two runs: ids, and the name of the file for a plan.
OWN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|plans/[\w-]+")


def count_ready(service: ServiceProcess, kind: str) -> int:
    """Return how many Claude Codes the service has started in advance so far."""
    return sum(f"a Claude Code ({kind}) was started in advance" in line for line in service.log)


def uses(service: ServiceProcess, run_id: str) -> bool:
    return any(f"run {run_id}: uses a Claude Code" in line for line in service.log)


def requests_of(api: MessagesAPI, prompt: str) -> list[str]:
    """Return the requests to the model with this prompt as JSON, without what differs between any two runs."""
    found = [request for request in api.requests if prompt in (api.prompts(request) or [""])[-1]]
    return [OWN.sub("OWN", json.dumps(request, sort_keys=True)) for request in found]


def kinds(client: Client, run_id: str) -> list[tuple[str, str | None]]:
    messages = client.get(f"/api/runs/{run_id}/messages").json
    return [(message["type"], message.get("subtype")) for message in messages]


@pytest.mark.main_job
def test_a_start_uses_a_spare_and_a_resume_and_a_fork_warm_ones(serve: ServeFunction, project: Path) -> None:
    service = serve(CCM_SPARE_RUNS=1, CCM_WARM_SESSIONS=1)
    client = Client(service.url)
    until(lambda: count_ready(service, "spare") == 1, 120)

    first = client.start(project, "first")
    until(lambda: count_ready(service, "warm") == 1, 120)
    second = client.resume(first["sessionId"], "second")
    until(lambda: count_ready(service, "warm") == 2, 120)
    branch = client.fork(first["sessionId"], "branch")

    runs = (first, second, branch)
    assert [run["status"] for run in runs] == ["completed"] * 3
    assert all(uses(service, run["id"]) for run in runs), "\n".join(service.log)
    assert second["parentRunId"] == first["id"]
    assert branch["parentRunId"] == second["id"]


PROJECT_SETTINGS = {"hooks": {"SessionStart": [{"hooks": [{"type": "command", "command": "echo from the hook"}]}]}}
SERVED: list[Mapping[str, Any]] = [
    {},
    *({"permissionMode": mode} for mode in ("default", "plan", "dontAsk", "auto")),
    *({"model": model} for model in ("opus", "claude-haiku-4-5")),
    {"systemPrompt": "Answer in rhymes."},
    {"systemPrompt": {"type": "custom", "prompt": "Answer in verses."}},
    {"systemPrompt": {"type": "preset", "preset": "claude_code"}},
    {"systemPrompt": {"type": "preset", "preset": "claude_code", "append": "Answer tersely."}},
    {"agents": {"reviewer": {"description": "Reviews.", "prompt": "You review.", "tools": ["Read"]}}},
    {"additionalDirectories": ["/usr/share"]},
    {"verbatimPrompts": True},
]


AT_START: Mapping[str, Any] = {
    "maxTurns": 5,
    "maxBudgetUsd": 2.5,
    "taskBudget": {"total": 50_000},
    "fallbackModel": "claude-haiku-4-5",
    "betas": ["context-1m-2025-08-07"],
    "effort": "low",
    "thinking": {"type": "adaptive"},
    "tools": ["Bash", "Read"],
    "allowedTools": ["Bash(ls:*)"],
    "disallowedTools": ["Read(./secret)"],
    "strictMcpConfig": True,
    "settingSources": ["project"],
    "includePartialMessages": True,
    "includeHookEvents": True,
    "forwardSubagentText": True,
    "outputFormat": {"type": "json_schema", "schema": {"type": "object"}},
}


@pytest.fixture
def hooked(project: Path) -> Path:
    """Return a project with instructions, a skill, and a hook at the start of a session."""
    (project / "CLAUDE.md").write_text("Be kind.\n")
    skill = project / ".claude" / "skills" / "tidy" / "SKILL.md"
    skill.parent.mkdir(parents=True)
    skill.write_text("---\nname: tidy\ndescription: Tidies up.\n---\nTidy up.\n")
    (project / ".claude" / "settings.json").write_text(json.dumps(PROJECT_SETTINGS))
    return project


@pytest.mark.parametrize("options", SERVED, ids=json.dumps)
def test_a_spare_sends_the_same_request_and_messages_as_a_cold_start(
    serve: ServeFunction, hooked: Path, messages_api: MessagesAPI, options: Mapping[str, Any]
) -> None:
    service = serve(CCM_SPARE_RUNS=1, CCM_PRIVILEGED_OPTIONS="permissionMode,additionalDirectories,env")
    client, prompt = Client(service.url), f"prompt {uuid.uuid4()}"
    until(lambda: count_ready(service, "spare") == 1, 120)

    spare = client.start(hooked, prompt, options=options)
    cold = client.start(hooked, prompt, options={**options, "env": {}})

    assert uses(service, spare["id"]), "\n".join(service.log)
    assert not uses(service, cold["id"])
    assert kinds(client, spare["id"]) == kinds(client, cold["id"])
    of_spare, of_cold = requests_of(messages_api, prompt)
    assert of_spare == of_cold


def test_spares_follow_the_options_of_the_last_two_runs(
    serve: ServeFunction, hooked: Path, messages_api: MessagesAPI
) -> None:
    service = serve(CCM_SPARE_RUNS=1, CCM_PRIVILEGED_OPTIONS="settingSources")
    client, prompt = Client(service.url), f"prompt {uuid.uuid4()}"

    runs = [client.start(hooked, prompt, options=AT_START, approvals=True) for _ in range(2)]
    started = count_ready(service, "spare")
    until(lambda: count_ready(service, "spare") > started, 120)
    runs.append(client.start(hooked, prompt, options=AT_START, approvals=True))

    assert [uses(service, run["id"]) for run in runs] == [False, False, True]
    assert kinds(client, runs[2]["id"]) == kinds(client, runs[1]["id"])
    requests = requests_of(messages_api, prompt)
    assert len(set(requests[: len(requests) // 3])) == len(set(requests))


def test_every_option_is_given_at_the_claim_or_at_the_start_or_needs_a_cold_start() -> None:
    tried = {name for options in SERVED for name in options}

    assert tried == set(prestart_key.AT_CLAIM)
    assert set(AT_START) == set(prestart_key.AT_START)
    assert {*prestart_key.AT_CLAIM, *prestart_key.AT_START} <= set(Options.model_fields)


def test_a_project_whose_settings_refuse_a_spare_starts_cold_and_is_not_tried_again(
    serve: ServeFunction, hooked: Path
) -> None:
    (hooked / ".claude" / "settings.json").write_text(json.dumps({"env": {"A": "b"}}))
    service = serve(CCM_SPARE_RUNS=1)
    client = Client(service.url)
    until(lambda: count_ready(service, "spare") == 1, 120)

    refused = client.start(hooked, "refused")
    until(lambda: count_ready(service, "spare") == 2, 120)
    cold = client.start(hooked, "cold")

    assert [run["status"] for run in (refused, cold)] == ["completed"] * 2
    (line,) = (line for line in service.log if "not the spare one" in line)
    assert f"run {refused['id']}" in line
    assert "settings_not_claimable" in line


def test_a_project_that_denies_a_tool_starts_cold(serve: ServeFunction, hooked: Path) -> None:
    (hooked / ".claude" / "settings.json").write_text(json.dumps({"permissions": {"deny": ["WebFetch"]}}))
    service = serve(CCM_SPARE_RUNS=1)
    client = Client(service.url)
    until(lambda: count_ready(service, "spare") == 1, 120)

    run = client.start(hooked, "hello")

    (init,) = (message for message in client.messages(run["id"]) if message.get("subtype") == "init")
    assert "WebFetch" not in init["tools"]
    assert not uses(service, run["id"])


def test_a_fork_leaves_its_session_warm(serve: ServeFunction, project: Path) -> None:
    service = serve(CCM_WARM_SESSIONS=2)
    client = Client(service.url)
    first = client.start(project, "first")
    until(lambda: count_ready(service, "warm") == 1, 120)

    branch = client.fork(first["sessionId"], "branch")
    until(lambda: count_ready(service, "warm") == 3, 120)  # the session's and the branch's
    runs = [branch, client.resume(first["sessionId"], "resume"), client.resume(branch["sessionId"], "resume")]

    assert [uses(service, run["id"]) for run in runs] == [True] * 3


def test_a_spare_takes_a_cancel_and_later_messages_as_any_other(serve: ServeFunction, project: Path) -> None:
    service = serve(CCM_SPARE_RUNS=1)
    client = Client(service.url)
    until(lambda: count_ready(service, "spare") == 1, 120)

    run = client.start(project, "[[stall]]", wait=0)
    until(lambda: uses(service, run["id"]))
    until(lambda: client.get(f"/api/runs/{run['id']}/messages").json)
    client.delete(f"/api/runs/{run['id']}")

    assert client.run(run["id"])["status"] == "cancelled"
    assert not marked(run["id"])


def test_approvals_of_a_warm_continuation_are_asked(serve: ServeFunction, project: Path) -> None:
    service = serve(CCM_WARM_SESSIONS=1)
    client = Client(service.url)
    first = client.start(project, "hello", approvals=True)
    until(lambda: count_ready(service, "warm") == 1, 120)

    run = client.resume(
        first["sessionId"], '[[tool Bash {"command": "touch made-by-the-agent"}]]', wait=0, approvals=True
    )
    (approval,) = until(lambda: client.get(f"/api/runs/{run['id']}/approvals").json)
    client.post(f"/api/approvals/{approval['id']}", {"decision": "allow"})

    assert client.run(run["id"])["status"] == "completed"
    assert uses(service, run["id"])
    assert (project / "made-by-the-agent").exists()


def test_the_parent_of_a_warm_continuation_is_unchanged_although_it_is_never_used(
    serve: ServeFunction, project: Path, environ: dict[str, str]
) -> None:
    service = serve(CCM_WARM_SESSIONS=1)
    client = Client(service.url)
    first = client.start(project, "hello")
    transcript = transcript_path(str(project), first["sdkSessionId"], environ)
    before = transcript.read_bytes()
    until(lambda: count_ready(service, "warm") == 1, 120)
    files = sorted(transcript.parent.iterdir())

    service.process.terminate()

    assert service.wait() == 0
    assert transcript.read_bytes() == before
    assert sorted(transcript.parent.iterdir()) == files
