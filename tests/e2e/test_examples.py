"""The examples in the description of the API: real requests and answers, recorded from a run of the real Claude Code.

The test fails when the service answers otherwise. It then names the file with the new examples.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ccm.api.openapi.document import EXAMPLES
from tests.client import Answer, Client
from tests.conftest import ServeFunction
from tests.event_source import Stream
from tests.receiver import Receiver
from tests.waiting import until

UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# Ids of Claude's API and of webhooks: their prefixes tell what they are.
PREFIXED = re.compile(r"\b(toolu|msg|evt)_\w+")
# The directives that tell the stand-in for the model what to do.
DIRECTIVE = re.compile(r"\s*\[\[.*\]\]", re.DOTALL)
# Values that differ from run to run, by the name of their field.
VOLATILE = {
    "createdAt": "2026-11-22T09:40:58.121Z",
    "startedAt": "2026-11-22T09:40:58.122Z",
    "timestamp": "2026-11-22T09:40:58.122Z",
    "at": "2026-11-22T09:40:58.131Z",
    "firstRunAt": "2026-11-22T09:40:58.121Z",
    "endedAt": "2026-11-22T09:40:58.866Z",
    "resolvedAt": "2026-11-22T09:41:04.310Z",
    "lastRunAt": "2026-11-22T09:41:12.904Z",
    "expiresAt": "2026-11-22T10:40:58.865Z",
    "nextAttemptAt": "2026-11-22T09:41:03.812Z",
    "durationMs": 742,
    "duration_ms": 742,
    "costUsd": 0.022412,
    "total_cost_usd": 0.022412,
    "host": "hooks.example.com:443",
    "webhookUrl": "https://hooks.example.com/agents",
}
# The fields of SDK messages that the examples show. Messages have more, which differ between versions of Claude Code.
SHOWN = {
    *("type", "subtype", "uuid", "session_id", "parent_tool_use_id", "message", "role", "content", "text"),
    *("id", "name", "input", "tool_use_id", "is_error", "num_turns", "result", "duration_ms", "total_cost_usd"),
    *("permission_denials", "file_path"),
}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


class Recording:
    """The examples so far, as examples.json has them: by the id of the operation, or the name of a common response.

    Args:
        places: texts that differ from run to run, such as directories, and what stands for them.
    """

    def __init__(self, places: dict[str, str]) -> None:
        self.examples: dict[str, dict[str, Any]] = {}
        self._places = places
        self._ids: dict[str, str] = {}

    def request(self, operation: str, body: Any) -> None:
        self.examples.setdefault(operation, {})["request"] = self._normal(body)

    def answer(self, operation: str, answer: Answer, status: int) -> Any:
        """Record an answer, which must have this status. Return its JSON."""
        assert answer.status == status, answer.body
        self.value(operation, status, answer.json)
        return answer.json

    def value(self, operation: str, status: int, value: Any) -> None:
        self.examples.setdefault(operation, {})[str(status)] = self._normal(value)

    def text(self) -> str:
        return json.dumps(dict(sorted(self.examples.items())), indent=1) + "\n"

    def _normal(self, value: Any, name: str = "", message: bool = False) -> Any:
        if isinstance(value, dict):
            message = message or {"type", "session_id"} <= set(value)  # an SDK message
            shown = {key: each for key, each in value.items() if not message or key in SHOWN}
            return {key: self._normal(each, key, message) for key, each in shown.items()}
        if isinstance(value, list):
            return [self._normal(each, message=message) for each in value]
        if value is not None and name in VOLATILE:
            return VOLATILE[name]
        return self._text(value) if isinstance(value, str) else value

    def _text(self, text: str) -> str:
        for place, shown in self._places.items():
            text = text.replace(place, shown)
        text = TIME.sub(str(VOLATILE["resolvedAt"]), text)
        text = UUID.sub(lambda found: self._id(found[0], "uuid"), text)
        return DIRECTIVE.sub("", PREFIXED.sub(lambda found: self._id(found[0], found[1]), text))

    def _id(self, text: str, kind: str) -> str:
        """Return an id that depends only on how many ids there were before this one."""
        if text not in self._ids:
            digest = hashlib.md5(str(len(self._ids)).encode(), usedforsecurity=False)
            shown = str(uuid.UUID(bytes=digest.digest(), version=4))
            self._ids[text] = shown if kind == "uuid" else f"{kind}_{digest.hexdigest()[:24]}"
        return self._ids[text]


def write(path: Path) -> str:
    return (
        f"[[tool Write {json.dumps({'file_path': str(path), 'content': 'A project.'})}]] [[text I created README.md.]]"
    )


@pytest.mark.main_job
def test_the_examples_are_what_the_service_answers(serve: ServeFunction, project: Path, tmp_path: Path) -> None:
    client = Client(serve().url)
    with Receiver() as receiver:
        recording = Recording({str(project): "/home/me/project"})
        record(client, recording, project, receiver.url)
    new = tmp_path / EXAMPLES.name
    new.write_text(recording.text())

    assert recording.examples == json.loads(EXAMPLES.read_text()), f"{new} has the new examples"


def record(client: Client, recording: Recording, project: Path, webhook: str) -> None:
    """Record one example of each request and of each answer of an operation that succeeds, and of some errors."""
    recording.answer("getHealth", client.get("/health"), 200)
    run = start(client, recording, project, webhook)
    session = run["sessionId"]
    approved(client, recording, project)
    continued(client, recording, project, session)
    read(client, recording, run)
    followed(client, recording, run)


def start(client: Client, recording: Recording, project: Path, webhook: str) -> Any:
    script = "Create a README file. " + write(project / "README.md")
    body = {"cwd": str(project), "prompt": script, "title": "Docs", "metadata": {"ticket": 17}, "webhookUrl": webhook}
    recording.request("startRun", body)
    run = recording.answer("startRun", client.post("/api/runs/start", body, wait=60), 200)
    recording.answer("Error400", client.post("/api/runs/start", {"cwd": str(project)}), 400)
    forbidden = {**body, "options": {"permissionMode": "bypassPermissions"}}
    recording.answer("startRun", client.post("/api/runs/start", forbidden), 403)
    path = f"/api/runs/{run['id']}/deliveries"
    until(lambda: [each["status"] for each in client.get(path).json] == ["delivered"] * 2)
    recording.answer("listDeliveries", client.get(path, limit=1), 200)
    return run


def approved(client: Client, recording: Recording, project: Path) -> None:
    script = 'Run the tests. [[tool Bash {"command": "make test"}]] [[text They pass.]]'
    body = {"cwd": str(project), "prompt": script, "approvals": True}
    run = recording.answer("startRun", client.post("/api/runs/start", body), 202)
    asked = client.get("/api/approvals", status="pending", wait=60)
    [approval] = recording.answer("listApprovals", asked, 200)
    path = f"/api/approvals/{approval['id']}"
    recording.answer("getApproval", client.get(path), 200)
    recording.answer("listRunApprovals", client.get(f"/api/runs/{run['id']}/approvals"), 200)
    answer = {"decision": "deny", "message": "Not today."}
    recording.request("answerApproval", answer)
    recording.answer("answerApproval", client.post(path, answer), 200)
    recording.answer("answerApproval", client.post(path, {"decision": "allow"}), 409)
    client.run(run["id"])
    again = client.post("/api/runs/start", body).json
    assert client.get("/api/approvals", runId=again["id"], wait=60).json
    recording.answer("cancelRun", client.delete(f"/api/runs/{again['id']}"), 200)
    recording.answer("listRuns", client.get("/api/runs", status="cancelled"), 200)


def continued(client: Client, recording: Recording, project: Path, session: str) -> None:
    body = {"sessionId": session, "prompt": "Add a section on tests. [[text I added it.]]"}
    recording.request("resumeRun", body)
    recording.answer("resumeRun", client.post("/api/runs/resume", body, wait=60), 200)
    body = {"sessionId": session, "prompt": "In German, please. [[text Gern.]]"}
    recording.request("forkRun", body)
    recording.answer("forkRun", client.post("/api/runs/fork", body, wait=60), 200)
    long = client.start(project, "Explain it. [[slow 600 0.1]]", wait=0)
    path = f"/api/runs/{long['id']}"
    recording.answer("resumeRun", client.post("/api/runs/resume", {**body, "sessionId": long["sessionId"]}), 409)
    client.wait_for_message(long["id"], "system")
    follow_up = {"prompt": "Keep it short."}
    recording.request("sendInput", follow_up)
    recording.answer("sendInput", client.post(f"{path}/input", follow_up), 202)
    client.delete(path)  # not recorded, because what it has said by now differs
    recording.answer("sendInput", client.post(f"{path}/input", follow_up), 409)


def read(client: Client, recording: Recording, run: Any) -> None:
    session, described = f"/api/sessions/{run['sessionId']}", {"title": "Documentation"}
    recording.answer("getRun", client.get(f"/api/runs/{run['id']}"), 200)
    recording.answer("getRun", client.get("/api/runs/00000000-0000-4000-8000-000000000000"), 404)
    recording.answer("cancelRun", client.delete(f"/api/runs/{run['id']}"), 409)
    recording.request("updateSession", described)
    recording.answer("updateSession", client.patch(session, described), 200)
    recording.answer("getSession", client.get(session), 200)
    recording.answer("listSessions", client.get("/api/sessions", q="documentation"), 200)
    recording.answer("listSessionRuns", client.get(f"{session}/runs", limit=1), 200)
    recording.answer("listForks", client.get(f"{session}/forks", limit=1), 200)
    types = "assistant,user,result"
    recording.answer("listRunMessages", client.get(f"/api/runs/{run['id']}/messages", type=types), 200)
    recording.answer("listSessionMessages", client.get(f"{session}/messages", type=types, limit=2), 200)


def followed(client: Client, recording: Recording, run: Any) -> None:
    after = run["messageCount"] - 3
    for operation, path, count in (
        ("streamRun", f"/api/runs/{run['id']}/stream?after={after}", 3),
        ("streamSession", f"/api/sessions/{run['sessionId']}/stream?after={run['id']}:{after}", 3),
        ("streamEvents", "/api/events", 3),
    ):
        with Stream(client, path) as stream:
            events = list(islice(stream, count))
        frames = [{"event": event.type, "id": event.id, "data": event.json} for event in events]
        recording.value(operation, 200, frames)
