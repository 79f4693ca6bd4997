"""`DELETE` in every state of a run, with the real Claude Code."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import termios
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.processes import marked
from tests.client import Client
from tests.conftest import ServeFunction
from tests.e2e.test_endings import SLEEPING_TOOL, SLOW, commands
from tests.storage_faults import locked
from tests.waiting import until


def connecting(_client: Client, _run_id: str) -> None:
    """Return before the first message of Claude Code."""


def has_message(*kinds: str) -> Callable[[Client, str], None]:
    """Return a function that waits until a message of one of the types or subtypes is stored."""

    def reached(client: Client, run_id: str) -> None:
        until(lambda: any({m["type"], m.get("subtype")} & set(kinds) for m in client.messages(run_id)))

    return reached


def tool_runs(_client: Client, run_id: str) -> None:
    until(lambda: "sleep 300" in commands(run_id))


def waits_for_approval(client: Client, run_id: str) -> None:
    until(lambda: client.run(run_id, wait=0)["pendingApprovals"])


def has_queued(client: Client, run_id: str) -> None:
    has_message("stream_event")(client, run_id)
    for prompt in (f"Then this. {SLOW}", "And that."):
        assert client.post(f"/api/runs/{run_id}/input", {"prompt": prompt}).status == 202


@dataclass(frozen=True)
class State:
    """A state of a run, and the prompt that leads to it.

    Args:
        reached: returns when a run of this prompt is in the state.
        reason: the `terminal_reason` of the partial result; None if there is no result.
    """

    prompt: str
    reached: Callable[[Client, str], None]
    reason: str | None
    options: dict[str, Any] = field(default_factory=dict)
    follow_ups: tuple[str, ...] = ()
    approvals: bool = False


BASH = {"allowedTools": ["Bash"]}
PARTIAL = {"includePartialMessages": True}
AGENT = json.dumps({"description": "sub", "prompt": SLOW, "subagent_type": "general-purpose"})
STATES = {
    "connecting": State("Hello.", connecting, None),
    "no byte yet": State("[[hang]]", has_message("init"), "aborted_streaming"),
    "streaming": State(SLOW, has_message("stream_event"), "aborted_streaming", PARTIAL),
    "stalled in mid-stream": State("[[stall]]", has_message("stream_event"), "aborted_streaming", PARTIAL),
    "a tool runs": State(SLEEPING_TOOL, tool_runs, "aborted_tools", BASH),
    "asking": State('[[tool Bash {"command": "touch asked"}]]', waits_for_approval, "aborted_tools", approvals=True),
    "retrying the API": State("[[status 500]]", has_message("api_retry"), "aborted_streaming"),
    "an agent works in the background": State(
        f"[[tool Task {AGENT}]] [[text Started it.]]", has_message("result"), "completed"
    ),
    "follow-ups in the queue": State(
        SLOW, has_queued, "aborted_streaming", PARTIAL, (f"Then this. {SLOW}", "And that.")
    ),
}


MAIN_STATES = {"streaming", "a tool runs"}


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(state, id=name, marks=[pytest.mark.main_job] if name in MAIN_STATES else [])
        for name, state in STATES.items()
    ],
)
def test_a_cancelled_run_keeps_its_partial_result_and_can_be_continued(
    client: Client, project: Path, state: State
) -> None:
    run = client.start(project, state.prompt, wait=0, options=state.options, approvals=state.approvals)
    state.reached(client, run["id"])

    answer = client.delete(f"/api/runs/{run['id']}")

    assert [answer.status, answer.json["status"], answer.json["error"]] == [200, "cancelled", None]
    assert (answer.json["result"] or {}).get("terminal_reason") == state.reason
    assert marked(run["id"]) == []
    assert answer.json["pendingApprovals"] == 0
    again = client.delete(f"/api/runs/{run['id']}")
    assert [again.status, again.json] == [200, answer.json]
    prompts = [m["message"]["content"][-1].get("text") for m in client.messages(run["id"]) if m["type"] == "user"]
    assert [prompt for prompt in prompts if prompt in state.follow_ups] == list(state.follow_ups)
    resumed = client.post("/api/runs/resume", {"sessionId": run["sessionId"], "prompt": "Go on."}, wait=60)
    if client.get(f"/api/sessions/{run['sessionId']}").json["headRunId"] is None:
        assert state.reached is connecting, "its transcript was lost"
        assert resumed.error["code"] == "SESSION_NOT_RESUMABLE"
    else:
        assert resumed.json["status"] == "completed"


def test_a_queued_run_is_cancelled_before_it_starts(serve: ServeFunction, project: Path) -> None:
    client = Client(serve(CCM_MAX_CONCURRENT_RUNS=1).url)
    first = client.start(project, SLOW, wait=0)
    waiting = [client.start(project, f"Number {n}.", wait=0) for n in range(2)]
    assert [client.run(run["id"], wait=0)["queuePosition"] for run in waiting] == [1, 2]

    answer = client.delete(f"/api/runs/{waiting[0]['id']}")

    assert answer.json["status"] == "cancelled"
    assert [answer.json["startedAt"], answer.json["messageCount"]] == [None, 0]
    assert client.delete(f"/api/runs/{waiting[0]['id']}").json == answer.json
    assert client.run(waiting[1]["id"], wait=0)["queuePosition"] == 1
    client.delete(f"/api/runs/{first['id']}")
    assert client.run(waiting[1]["id"])["status"] == "completed"


def unread_bytes(run_id: str) -> int:
    """Return how much of an agent's output waits in the pipe."""
    (pid, *_) = marked(run_id)
    pipe = os.open(f"/proc/{pid}/fd/1", os.O_RDONLY | os.O_NONBLOCK)
    try:
        return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
    finally:
        os.close(pipe)


def test_under_back_pressure_a_cancel_stops_the_agent_at_once_and_is_stored_later(
    serve: ServeFunction, project: Path, tmp_path: Path
) -> None:
    service = serve(CCM_MESSAGE_BUDGET_BYTES=2**16)
    client = Client(service.url)
    run = client.start(project, "[[slow 20000 0.002]]", wait=0, options=PARTIAL)
    has_message("stream_event")(client, run["id"])
    with ThreadPoolExecutor(1) as pool:
        with locked(f"sqlite:///{tmp_path}/db.sqlite"):
            until(lambda: client.get("/health").status == 503)
            until(lambda: unread_bytes(run["id"]) > 2**15)
            answer = pool.submit(client.delete, f"/api/runs/{run['id']}")
            until(lambda: not marked(run["id"]))
            assert not answer.done()

        assert [answer.result().status, answer.result().json["status"]] == [200, "cancelled"]
        assert answer.result().json["result"] is None  # not requested, because no reader could have received it
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"


def test_a_cancel_while_claude_code_exits_does_not_change_the_end(client: Client, project: Path) -> None:
    ending = project / "ending"
    hook = {"hooks": [{"type": "command", "command": f"touch '{ending}'; perl -e 'sleep 1'"}]}
    (project / ".claude").mkdir()
    (project / ".claude" / "settings.json").write_text(json.dumps({"hooks": {"SessionEnd": [hook]}}))
    run = client.start(project, "Hello.", wait=0)
    # The hook runs after the result, when Claude Code is idle and ends its session.
    until(ending.exists)

    answer = client.delete(f"/api/runs/{run['id']}")

    assert [answer.status, answer.error["code"]] == [409, "RUN_ALREADY_ENDED"]
    ended = client.run(run["id"])
    assert [ended["status"], ended["result"]["subtype"]] == ["completed", "success"]
    assert marked(run["id"]) == []
    assert client.resume(run["sessionId"], "Go on.")["status"] == "completed"


@pytest.mark.main_job
def test_an_ended_run_cannot_be_cancelled(client: Client, project: Path) -> None:
    run = client.start(project, "Hello.")

    answer = client.delete(f"/api/runs/{run['id']}")
    assert [answer.status, answer.error["code"]] == [409, "RUN_ALREADY_ENDED"]
    assert client.run(run["id"]) == run
