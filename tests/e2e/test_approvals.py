"""Approvals with the real Claude Code: it executes only allowed tool calls, and no approval stays pending."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.processes import marked
from ccm.testing.messages_api import MessagesAPI
from tests.client import Client
from tests.conftest import ProgramFunction, ServeFunction
from tests.docs import filled_in, page, samples

# The longest wait of one request, and of a whole approval (seconds).
POLL_TIMEOUT = 12
LONG_DELAY = 10 * 60


def bash(command: str) -> str:
    return f"[[tool Bash {json.dumps({'command': command})}]]"


def write(project: Path, name: str) -> str:
    return f"[[tool Write {json.dumps({'file_path': str(project / name), 'content': 'x'})}]]"


def start(client: Client, cwd: Path, prompt: str, **fields: Any) -> dict[str, Any]:
    return client.start(cwd, prompt, wait=0, approvals=True, **fields)


def pending_approval(client: Client, run: dict[str, Any]) -> dict[str, Any]:
    """Wait for a run's pending approval and return it; other runs may have pending approvals too."""
    path: str | None = "/api/approvals?status=pending&wait=50"
    while path is not None:
        answer = client.get(path)
        assert answer.json, "the run requested no approval in time"
        for approval in answer.json:
            if approval["runId"] == run["id"]:
                pending: dict[str, Any] = approval
                return pending
        path = answer.next
    raise AssertionError("the answer to a wait has no next page")


def decide(client: Client, approval: dict[str, Any], decision: str = "allow", **fields: Any) -> dict[str, Any]:
    answer = client.post(f"/api/approvals/{approval['id']}", {"decision": decision, **fields})
    assert answer.status == 200, answer.body
    decided: dict[str, Any] = answer.json
    return decided


def tool_results(client: Client, run: dict[str, Any]) -> list[str]:
    """Return the tool results that a run sent to the model."""
    blocks = [
        block
        for message in client.messages(run["id"], type="user")
        for block in message["message"]["content"]
        if isinstance(block, dict) and block["type"] == "tool_result"
    ]
    return [block["content"] if isinstance(block["content"], str) else json.dumps(block["content"]) for block in blocks]


def approval_statuses(client: Client, run: dict[str, Any]) -> list[str]:
    return [approval["status"] for approval in client.get(f"/api/runs/{run['id']}/approvals").json]


# ---- with an answer


@pytest.mark.main_job
def test_an_allowed_tool_call_is_executed(client: Client, project: Path) -> None:
    run = start(client, project, write(project, "new.txt"))
    approval = pending_approval(client, run)

    # Without options edits need no permission, but with `approvals` they need an approval too.
    assert [approval["toolName"], approval["input"]["content"]] == ["Write", "x"]
    assert approval["toolUseId"].startswith("toolu_")
    assert not (project / "new.txt").exists()
    assert client.run(run["id"], wait=0)["pendingApprovals"] == 1
    decide(client, approval)
    ended = client.run(run["id"])
    assert [ended["status"], ended["pendingApprovals"], ended["permissionDenials"]] == ["completed", 0, []]
    assert (project / "new.txt").read_text() == "x"


@pytest.mark.main_job
def test_a_denied_tool_call_is_not_executed_and_the_model_gets_the_reason(
    client: Client, project: Path, messages_api: MessagesAPI
) -> None:
    run = start(client, project, bash("touch denied.txt"))
    decide(client, pending_approval(client, run), "deny", message="Better not, says 4711.")
    ended = client.run(run["id"])

    assert ended["status"] == "completed"
    assert [denial["tool_name"] for denial in ended["permissionDenials"]] == ["Bash"]
    assert not (project / "denied.txt").exists()
    assert tool_results(client, run) == ["Better not, says 4711."]
    assert "Better not, says 4711." in json.dumps(messages_api.requests[-1]["messages"])


def test_a_denial_may_end_the_turn(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch denied.txt") + "[[text I continued.]]")
    decide(client, pending_approval(client, run), "deny", interrupt=True, message="Leave it.")
    ended = client.run(run["id"])

    assert [ended["status"], ended["error"]["code"]] == ["error", "APPROVAL_DENIED"]
    assert ended["error"]["message"] == "An approval was denied with interrupt: Leave it."
    assert ended["result"]["terminal_reason"] == "aborted_tools"
    assert "I continued." not in json.dumps(client.messages(run["id"], type="assistant"))
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"


@pytest.mark.main_job
def test_a_changed_input_is_executed_and_recorded(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch asked.txt"))
    decide(client, pending_approval(client, run), updatedInput={"command": "touch changed.txt"})

    assert client.run(run["id"])["status"] == "completed"
    assert [(project / f"{name}.txt").exists() for name in ("asked", "changed")] == [False, True]
    (approval,) = client.get(f"/api/runs/{run['id']}/approvals").json
    assert [approval["input"]["command"], approval["updatedInput"]] == [
        "touch asked.txt",
        {"command": "touch changed.txt"},
    ]


@pytest.mark.main_job
def test_a_remembered_rule_applies_to_the_run_only_and_changes_no_settings(
    client: Client, home: Path, project: Path
) -> None:
    def settings() -> dict[str, str]:
        files = [*project.rglob("settings*.json"), *(home / ".claude").glob("settings*.json")]
        return {str(file): file.read_text() for file in files}

    before = settings()
    run = start(client, project, bash("perl -e 'print 1'") * 2)
    approval = pending_approval(client, run)
    assert [suggestion["destination"] for suggestion in approval["suggestions"]] == ["localSettings"]
    decide(client, approval, remember=True)

    assert client.run(run["id"])["status"] == "completed"
    assert tool_results(client, run) == ["1", "1"]
    assert approval_statuses(client, run) == ["allowed"]
    assert settings() == before
    again = client.resume(run["sessionId"], bash("perl -e 'print 1'"), wait=0, approvals=True)
    decide(client, pending_approval(client, again), "deny")
    assert client.run(again["id"])["status"] == "completed"


def test_parallel_tool_calls_request_approval_one_by_one(client: Client, project: Path) -> None:
    prompt = "[[and]]".join(bash(f"touch {name}.txt") for name in "abc")
    run = start(client, project, prompt)
    commands = []
    for decision in ("allow", "deny", "allow"):
        approval = pending_approval(client, run)
        commands.append(approval["input"]["command"])
        assert client.run(run["id"], wait=0)["pendingApprovals"] == 1
        decide(client, approval, decision)

    assert client.run(run["id"])["status"] == "completed"
    assert commands == [f"touch {name}.txt" for name in "abc"]
    assert [(project / f"{name}.txt").exists() for name in "abc"] == [True, False, True]


def test_an_approval_of_a_subagent_has_its_id(client: Client, project: Path) -> None:
    task = {
        "description": "touch",
        "prompt": bash("touch by-agent.txt"),
        "subagent_type": "general-purpose",
        "run_in_background": False,
    }
    run = start(client, project, f"[[tool Agent {json.dumps(task)}]]")
    approval = pending_approval(client, run)

    assert [approval["input"]["command"], bool(approval["agentId"])] == ["touch by-agent.txt", True]
    decide(client, approval)
    assert client.run(run["id"])["status"] == "completed"
    assert (project / "by-agent.txt").exists()


def test_the_answers_to_a_question_of_claude_reach_it(client: Client, project: Path) -> None:
    options = [{"label": "Red", "description": "warm"}, {"label": "Blue", "description": "cold"}]
    question = {"question": "Which colour?", "header": "Colour", "options": options, "multiSelect": False}
    run = start(client, project, f"[[tool AskUserQuestion {json.dumps({'questions': [question]})}]]")
    approval = pending_approval(client, run)

    assert approval["toolName"] == "AskUserQuestion"
    decide(client, approval, updatedInput={**approval["input"], "answers": {"Which colour?": "Blue"}})
    assert client.run(run["id"])["status"] == "completed"
    (result,) = tool_results(client, run)
    assert '"Which colour?"="Blue"' in result


def test_an_approved_plan_is_carried_out(client: Client, project: Path) -> None:
    prompt = '[[tool ExitPlanMode {"plan": "Write it."}]]' + write(project, "planned.txt")
    run = start(client, project, prompt, options={"permissionMode": "plan"})
    for tool in ("ExitPlanMode", "Write"):
        approval = pending_approval(client, run)
        assert approval["toolName"] == tool
        decide(client, approval)
    assert client.run(run["id"])["status"] == "completed"
    assert (project / "planned.txt").exists()


def test_the_approval_of_a_plan_shows_its_file(client: Client, project: Path, messages_api: MessagesAPI) -> None:
    run = start(client, project, "[[tool ExitPlanMode {}]]" * 2, options={"permissionMode": "plan"})
    first = pending_approval(client, run)
    assert first["input"] == {}
    # Claude Code gives the path of the plan to the model only.
    path = re.findall(r"[\w/.-]+/plans/[\w-]+\.md", json.dumps(messages_api.requests))[-1]
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("Write it.")
    decide(client, first, "deny")
    second = pending_approval(client, run)
    assert second["input"] == {"plan": "Write it.", "planFilePath": path}
    decide(client, second)
    assert client.run(run["id"])["status"] == "completed"


def test_the_sample_for_all_runs_answers_each_approval(
    serve: ServeFunction, program: ProgramFunction, project: Path, tmp_path: Path
) -> None:
    for name in ("curl", "jq"):
        program(name, name)
    (sample,) = [text for text in samples(page("approvals"), "sh") if text.startswith("NEXT=")]
    own = Client(serve().url)
    loop = subprocess.Popen(
        ["bash", "-c", filled_in(sample, {"localhost:3000": f"localhost:{own.port}"})],
        cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        runs = [start(own, project, write(project, f"{number}.txt") + bash("touch b")) for number in range(2)]
        assert [own.run(run["id"])["status"] for run in runs] == ["completed"] * 2
        assert [approval_statuses(own, run) for run in runs] == [["allowed", "denied"]] * 2
    finally:
        os.killpg(loop.pid, signal.SIGTERM)
        loop.wait()


def test_the_sample_answers_a_question(client: Client, project: Path) -> None:
    _, sample = samples(page("approvals"), "json")
    answer = json.loads(sample)
    asked = {"questions": answer["updatedInput"]["questions"]}
    run = start(client, project, f"[[tool AskUserQuestion {json.dumps(asked)}]]")
    approval = pending_approval(client, run)
    assert approval["input"] == asked
    assert client.post(f"/api/approvals/{approval['id']}", answer).status == 200
    assert client.run(run["id"])["status"] == "completed"
    (result,) = tool_results(client, run)
    assert '"Which colour?"="Blue"' in result


def test_a_tool_that_an_option_allows_needs_no_approval(client: Client, project: Path) -> None:
    run = client.start(project, bash("touch allowed.txt"), approvals=True, options={"allowedTools": ["Bash"]})
    assert [run["status"], approval_statuses(client, run)] == ["completed", []]
    assert (project / "allowed.txt").exists()


# ---- without an answer


def test_an_unanswered_approval_is_denied_and_the_model_gets_the_reason(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch late.txt"), approvalTimeoutMs=500)

    assert client.run(run["id"])["status"] == "completed"
    (approval,) = client.get(f"/api/runs/{run['id']}/approvals").json
    assert [approval["status"], approval["resolution"]] == ["denied", "timed_out"]
    assert tool_results(client, run) == [approval["message"]]
    assert not (project / "late.txt").exists()


def allow_after(client: Client, project: Path, seconds: int) -> None:
    # The run's own time limit is far shorter than the wait.
    run = start(client, project, bash("touch done.txt"), timeoutMs=10_000)
    approval = pending_approval(client, run)
    for _ in range(0, seconds, POLL_TIMEOUT):
        still = client.run(run["id"], wait=POLL_TIMEOUT)
        assert [still["status"], still["pendingApprovals"]] == ["running", 1]
    decide(client, approval)
    ended = client.run(run["id"])
    assert [ended["status"], ended["error"]] == ["completed", None]
    assert (project / "done.txt").exists()


def test_an_approval_may_wait_longer_than_the_time_limit_of_its_run(client: Client, project: Path) -> None:
    allow_after(client, project, POLL_TIMEOUT)


@pytest.mark.slow
def test_an_approval_may_wait_ten_minutes(client: Client, project: Path) -> None:
    allow_after(client, project, LONG_DELAY)


def test_a_run_cancelled_during_an_approval_can_be_continued(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch never.txt"))
    approval = pending_approval(client, run)
    cancelled = client.delete(f"/api/runs/{run['id']}").json

    assert [cancelled["status"], cancelled["pendingApprovals"]] == ["cancelled", 0]
    assert cancelled["result"]["subtype"] == "error_during_execution"
    assert marked(run["id"]) == []
    assert approval_statuses(client, run) == ["expired"]
    late = client.post(f"/api/approvals/{approval['id']}", {"decision": "allow"})
    assert [late.status, late.json["approval"]["status"]] == [409, "expired"]
    again = client.resume(run["sessionId"], "Go on.")
    assert [again["status"], again["parentRunId"]] == ["completed", run["id"]]
    assert not (project / "never.txt").exists()


def test_a_run_interrupted_by_the_next_one_leaves_no_pending_approval(client: Client, project: Path) -> None:
    run = start(client, project, bash("touch never.txt"))
    pending_approval(client, run)
    after = client.resume(run["sessionId"], "Another way.", ifBusy="interrupt")

    assert [after["status"], client.run(run["id"])["status"]] == ["completed", "cancelled"]
    assert approval_statuses(client, run) == ["expired"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_service_that_exits_during_an_approval_leaves_it_expired(
    serve: ServeFunction, project: Path, number: signal.Signals
) -> None:
    service = serve()
    client = Client(service.url)
    run = start(client, project, bash("touch never.txt"))
    approval = pending_approval(client, run)
    service.process.send_signal(number)
    assert service.wait() == (0 if number == signal.SIGTERM else -signal.SIGKILL)

    client = Client(serve().url)
    ended = client.run(run["id"])
    assert [ended["status"], ended["error"]["code"], ended["pendingApprovals"]] == ["error", "INTERRUPTED", 0]
    assert approval_statuses(client, run) == ["expired"]
    assert client.get("/api/approvals", status="pending").json == []
    late = client.post(f"/api/approvals/{approval['id']}", {"decision": "allow"})
    assert [late.status, late.error["code"]] == [409, "APPROVAL_ALREADY_RESOLVED"]
    assert marked(run["id"]) == []
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"
    assert not (project / "never.txt").exists()
