"""Approvals with the real Claude Code: what is allowed is done, what is not is not, and nothing is left waiting."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.processes import marked
from ccm.testing.messages_api import MessagesAPI
from tests.client import Client
from tests.conftest import ServeFunction

# Seconds.
ONE_WAIT = 12
LONG_WAIT = 10 * 60


def bash(command: str) -> str:
    return f"[[tool Bash {json.dumps({'command': command})}]]"


def write(project: Path, name: str) -> str:
    return f"[[tool Write {json.dumps({'file_path': str(project / name), 'content': 'x'})}]]"


def start(client: Client, cwd: Path, prompt: str, **fields: Any) -> dict[str, Any]:
    return client.start(cwd, prompt, wait=0, approvals=True, **fields)


def next_of(client: Client, run: dict[str, Any]) -> dict[str, Any]:
    """What a run waits for, once it does; other runs may wait too."""
    path: str | None = "/api/approvals?status=pending&wait=50"
    while path is not None:
        answer = client.get(path)
        assert answer.json, "it has not asked in time"
        for approval in answer.json:
            if approval["runId"] == run["id"]:
                found: dict[str, Any] = approval
                return found
        path = answer.next
    raise AssertionError("a wait has no end")


def decide(client: Client, approval: dict[str, Any], decision: str = "allow", **fields: Any) -> dict[str, Any]:
    answer = client.post(f"/api/approvals/{approval['id']}", {"decision": decision, **fields})
    assert answer.status == 200, answer.body
    decided: dict[str, Any] = answer.json
    return decided


def results(client: Client, run: dict[str, Any]) -> list[str]:
    """What the tools of a run gave back to the model."""
    blocks = [
        block
        for message in client.messages(run["id"], type="user")
        for block in message["message"]["content"]
        if isinstance(block, dict) and block["type"] == "tool_result"
    ]
    return [block["content"] if isinstance(block["content"], str) else json.dumps(block["content"]) for block in blocks]


def states(client: Client, run: dict[str, Any]) -> list[str]:
    return [approval["status"] for approval in client.get(f"/api/runs/{run['id']}/approvals").json]


# ---- answered


@pytest.mark.main_job
def test_what_is_allowed_is_done(client: Client, project: Path) -> None:
    run = start(client, project, write(project, "new.txt"))
    approval = next_of(client, run)

    # Without options edits need no permission; who wants to be asked is asked about them too.
    assert [approval["toolName"], approval["input"]["content"]] == ["Write", "x"]
    assert approval["toolUseId"].startswith("toolu_")
    assert not (project / "new.txt").exists()
    assert client.run(run["id"], wait=0)["pendingApprovals"] == 1
    decide(client, approval)
    ended = client.run(run["id"])
    assert [ended["status"], ended["pendingApprovals"], ended["permissionDenials"]] == ["completed", 0, []]
    assert (project / "new.txt").read_text() == "x"


@pytest.mark.main_job
def test_what_is_denied_is_not_done_and_the_model_is_told_why(
    client: Client, project: Path, messages_api: MessagesAPI
) -> None:
    run = start(client, project, bash("touch denied.txt"))
    decide(client, next_of(client, run), "deny", message="Better not, says 4711.")
    ended = client.run(run["id"])

    assert ended["status"] == "completed"
    assert [denial["tool_name"] for denial in ended["permissionDenials"]] == ["Bash"]
    assert not (project / "denied.txt").exists()
    assert results(client, run) == ["Better not, says 4711."]
    assert "Better not, says 4711." in json.dumps(messages_api.requests[-1]["messages"])


def test_a_denial_may_end_the_turn(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch denied.txt") + "[[text I went on.]]")
    decide(client, next_of(client, run), "deny", interrupt=True, message="Leave it.")
    ended = client.run(run["id"])

    assert [ended["status"], ended["error"]["code"]] == ["error", "APPROVAL_DENIED"]
    assert ended["error"]["message"] == "An approval was denied with interrupt: Leave it."
    assert ended["result"]["terminal_reason"] == "aborted_tools"
    assert "I went on." not in json.dumps(client.messages(run["id"], type="assistant"))
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"


@pytest.mark.main_job
def test_what_is_changed_is_executed_and_recorded(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch asked.txt"))
    decide(client, next_of(client, run), updatedInput={"command": "touch changed.txt"})

    assert client.run(run["id"])["status"] == "completed"
    assert [(project / f"{name}.txt").exists() for name in ("asked", "changed")] == [False, True]
    (approval,) = client.get(f"/api/runs/{run['id']}/approvals").json
    assert [approval["input"]["command"], approval["updatedInput"]] == [
        "touch asked.txt",
        {"command": "touch changed.txt"},
    ]


@pytest.mark.main_job
def test_what_is_remembered_holds_for_the_run_and_is_in_no_settings(client: Client, home: Path, project: Path) -> None:
    def settings() -> dict[str, str]:
        files = [*project.rglob("settings*.json"), *(home / ".claude").glob("settings*.json")]
        return {str(file): file.read_text() for file in files}

    before = settings()
    run = start(client, project, bash("perl -e 'print 1'") * 2)
    approval = next_of(client, run)
    assert [suggestion["destination"] for suggestion in approval["suggestions"]] == ["localSettings"]
    decide(client, approval, remember=True)

    assert client.run(run["id"])["status"] == "completed"
    assert results(client, run) == ["1", "1"]
    assert states(client, run) == ["allowed"]
    assert settings() == before
    again = client.resume(run["sessionId"], bash("perl -e 'print 1'"), wait=0, approvals=True)
    decide(client, next_of(client, again), "deny")
    assert client.run(again["id"])["status"] == "completed"


def test_tools_that_are_called_at_once_are_asked_about_one_by_one(client: Client, project: Path) -> None:
    prompt = "[[and]]".join(bash(f"touch {name}.txt") for name in "abc")
    run = start(client, project, prompt)
    asked = []
    for decision in ("allow", "deny", "allow"):
        approval = next_of(client, run)
        asked.append(approval["input"]["command"])
        assert client.run(run["id"], wait=0)["pendingApprovals"] == 1
        decide(client, approval, decision)

    assert client.run(run["id"])["status"] == "completed"
    assert asked == [f"touch {name}.txt" for name in "abc"]
    assert [(project / f"{name}.txt").exists() for name in "abc"] == [True, False, True]


def test_a_subagent_asks_too_and_says_which_it_is(client: Client, project: Path) -> None:
    task = {
        "description": "touch",
        "prompt": bash("touch by-agent.txt"),
        "subagent_type": "general-purpose",
        "run_in_background": False,
    }
    run = start(client, project, f"[[tool Agent {json.dumps(task)}]]")
    approval = next_of(client, run)

    assert [approval["input"]["command"], bool(approval["agentId"])] == ["touch by-agent.txt", True]
    decide(client, approval)
    assert client.run(run["id"])["status"] == "completed"
    assert (project / "by-agent.txt").exists()


def test_a_question_of_claudes_own_is_answered_with_its_answers(client: Client, project: Path) -> None:
    options = [{"label": "Red", "description": "warm"}, {"label": "Blue", "description": "cold"}]
    question = {"question": "Which colour?", "header": "Colour", "options": options, "multiSelect": False}
    run = start(client, project, f"[[tool AskUserQuestion {json.dumps({'questions': [question]})}]]")
    approval = next_of(client, run)

    assert approval["toolName"] == "AskUserQuestion"
    decide(client, approval, updatedInput={**approval["input"], "answers": {"Which colour?": "Blue"}})
    assert client.run(run["id"])["status"] == "completed"
    (result,) = results(client, run)
    assert '"Which colour?"="Blue"' in result


def test_a_plan_is_approved(client: Client, project: Path) -> None:
    prompt = '[[tool ExitPlanMode {"plan": "Write it."}]]' + write(project, "planned.txt")
    run = start(client, project, prompt, options={"permissionMode": "plan"})
    for tool in ("ExitPlanMode", "Write"):
        approval = next_of(client, run)
        assert approval["toolName"] == tool
        decide(client, approval)
    assert client.run(run["id"])["status"] == "completed"
    assert (project / "planned.txt").exists()


def test_a_plan_that_was_written_is_shown_to_who_approves_it(
    client: Client, project: Path, messages_api: MessagesAPI
) -> None:
    run = start(client, project, "[[tool ExitPlanMode {}]]" * 2, options={"permissionMode": "plan"})
    first = next_of(client, run)
    assert first["input"] == {}
    # Claude Code tells the model, and nobody else, where the plan is to be.
    path = re.findall(r"[\w/.-]+/plans/[\w-]+\.md", json.dumps(messages_api.requests))[-1]
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("Write it.")
    decide(client, first, "deny")
    second = next_of(client, run)
    assert second["input"] == {"plan": "Write it.", "planFilePath": path}
    decide(client, second)
    assert client.run(run["id"])["status"] == "completed"


def test_what_an_option_allows_is_not_asked_about(client: Client, project: Path) -> None:
    run = client.start(project, bash("touch allowed.txt"), approvals=True, options={"allowedTools": ["Bash"]})
    assert [run["status"], states(client, run)] == ["completed", []]
    assert (project / "allowed.txt").exists()


# ---- not answered


def test_what_nobody_answers_in_time_is_denied_and_the_model_is_told(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch late.txt"), approvalTimeoutMs=500)

    assert client.run(run["id"])["status"] == "completed"
    (approval,) = client.get(f"/api/runs/{run['id']}/approvals").json
    assert [approval["status"], approval["resolution"]] == ["denied", "timed_out"]
    assert results(client, run) == [approval["message"]]
    assert not (project / "late.txt").exists()


def waits_and_then_is_done(client: Client, project: Path, seconds: int) -> None:
    # Its own time is far shorter than the wait.
    run = start(client, project, bash("touch done.txt"), timeoutMs=10_000)
    approval = next_of(client, run)
    for _ in range(0, seconds, ONE_WAIT):
        still = client.run(run["id"], wait=ONE_WAIT)
        assert [still["status"], still["pendingApprovals"]] == ["running", 1]
    decide(client, approval)
    ended = client.run(run["id"])
    assert [ended["status"], ended["error"]] == ["completed", None]
    assert (project / "done.txt").exists()


def test_a_wait_may_take_longer_than_the_run_itself_may(client: Client, project: Path) -> None:
    waits_and_then_is_done(client, project, ONE_WAIT)


@pytest.mark.slow
def test_a_wait_may_take_ten_minutes(client: Client, project: Path) -> None:
    waits_and_then_is_done(client, project, LONG_WAIT)


def test_a_run_that_is_cancelled_while_it_waits_can_be_continued(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch never.txt"))
    approval = next_of(client, run)
    cancelled = client.delete(f"/api/runs/{run['id']}").json

    assert [cancelled["status"], cancelled["pendingApprovals"]] == ["cancelled", 0]
    assert cancelled["result"]["subtype"] == "error_during_execution"
    assert marked(run["id"]) == []
    assert states(client, run) == ["expired"]
    late = client.post(f"/api/approvals/{approval['id']}", {"decision": "allow"})
    assert [late.status, late.json["approval"]["status"]] == [409, "expired"]
    again = client.resume(run["sessionId"], "Go on.")
    assert [again["status"], again["parentRunId"]] == ["completed", run["id"]]
    assert not (project / "never.txt").exists()


def test_a_run_that_is_interrupted_by_the_next_leaves_nothing_pending(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch never.txt"))
    next_of(client, run)
    after = client.resume(run["sessionId"], "Another way.", ifBusy="interrupt")

    assert [after["status"], client.run(run["id"])["status"]] == ["completed", "cancelled"]
    assert states(client, run) == ["expired"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_service_that_ends_while_a_run_waits_leaves_nothing_pending(
    serve: ServeFunction, project: Path, number: signal.Signals
) -> None:
    service = serve()
    client = Client(service.url)
    run = start(client, project, bash("touch never.txt"))
    approval = next_of(client, run)
    service.process.send_signal(number)
    assert service.wait() == (0 if number == signal.SIGTERM else -signal.SIGKILL)

    client = Client(serve().url)
    ended = client.run(run["id"])
    assert [ended["status"], ended["error"]["code"], ended["pendingApprovals"]] == ["error", "INTERRUPTED", 0]
    assert states(client, run) == ["expired"]
    assert client.get("/api/approvals", status="pending").json == []
    late = client.post(f"/api/approvals/{approval['id']}", {"decision": "allow"})
    assert [late.status, late.error["code"]] == [409, "APPROVAL_ALREADY_RESOLVED"]
    assert marked(run["id"]) == []
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"
    assert not (project / "never.txt").exists()
