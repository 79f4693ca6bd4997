"""Approvals over HTTP, with a CLI that asks at once: requests, answers, timeouts, streams and lists."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from ccm.core.claude.processes import end_marked
from tests.api.conftest import NOWHERE, folder_of, refused, script
from tests.client import Answer, Client
from tests.conftest import ServeFunction
from tests.event_source import Stream, events_of
from tests.postgresql import new_database
from tests.waiting import until

BASH = {"tool_name": "Bash", "input": {"command": "make"}, "description": "make"}
RULES = {"type": "addRules", "rules": [{"toolName": "Bash", "ruleContent": "make"}], "behavior": "allow"}
SUGGESTED = {**RULES, "destination": "localSettings"}
MODE = {"type": "setMode", "mode": "acceptEdits", "destination": "session"}


@pytest.fixture(scope="module")
def sqlite_api(serve_all: ServeFunction) -> Client:
    """Return a client of a service on SQLite."""
    return Client(serve_all(CCM_APPROVAL_TIMEOUT="45m").url)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def api(request: pytest.FixtureRequest, serve_all: ServeFunction, sqlite_api: Client) -> Client:
    """Return a client of a service on each kind of database."""
    if request.param == "sqlite":
        return sqlite_api
    return Client(serve_all(DATABASE_URL=new_database(request.getfixturevalue("postgresql"))).url)


def start_asking(client: Client, cwd: Path, *questions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Start a run that makes these requests one after another, and then sends the answers as messages."""
    at_once = fields.pop("at_once", False)
    messages = fields.pop("messages", ())
    prompt = script(*messages, ask=list(questions), at_once=at_once)
    return client.start(cwd, prompt, wait=0, approvals=True, **fields)


def pending(client: Client, run: dict[str, Any], count: int = 1) -> list[dict[str, Any]]:
    """Return the pending approvals of a run once there are `count` of them. Other runs may have some too."""
    found: list[dict[str, Any]] = []
    path: str | None = "/api/approvals?status=pending&wait=30"
    while len(found) < count:
        assert path is not None
        answer = client.get(path)
        assert answer.json, f"it waits for {len(found)} only"
        found += [approval for approval in answer.json if approval["runId"] == run["id"]]
        path = answer.next
    return found


def ask_one(client: Client, cwd: Path, question: dict[str, Any] = BASH, **fields: Any) -> dict[str, Any]:
    """Start a run, and return its pending approval."""
    return pending(client, start_asking(client, cwd, question, **fields))[0]


def decide(client: Client, approval: dict[str, Any], decision: str, **fields: Any) -> Answer:
    return client.post(f"/api/approvals/{approval['id']}", {"decision": decision, **fields})


def answer_received(client: Client, approval: dict[str, Any]) -> Any:
    """Return the answer that Claude Code received, once the run has ended."""
    client.run(approval["runId"])
    (answered,) = client.messages(approval["runId"], type="answered")
    return answered["answer"]


# ---- requests


def test_an_approval_has_every_field_of_claude_codes_request(api: Client, project: Path) -> None:
    extra = {"title": "Claude wants to run make", "display_name": "Bash", "decision_reason": "It is not read-only."}
    more = {"agent_id": "agent-7", "blocked_path": "/srv/\ud800\0x", "permission_suggestions": [SUGGESTED, MODE]}
    run = start_asking(
        api, project, {**BASH, **extra, **more, "tool_use_id": "toolu_1", "input": {"odd": "\ud800\0\n"}}
    )
    (approval,) = pending(api, run)

    assert approval["id"] == approval["approvalId"]
    assert [approval["runId"], approval["sessionId"]] == [run["id"], run["sessionId"]]
    assert [approval["toolName"], approval["toolUseId"], approval["description"]] == ["Bash", "toolu_1", "make"]
    assert [approval["title"], approval["displayName"]] == [extra["title"], "Bash"]
    assert [approval["decisionReason"], approval["agentId"]] == [extra["decision_reason"], "agent-7"]
    assert approval["input"] == {"odd": "\ud800\0\n"}
    assert approval["blockedPath"] == "/srv/?\N{REPLACEMENT CHARACTER}x"
    assert approval["suggestions"] == [SUGGESTED, MODE]
    assert approval["status"] == "pending"
    assert [approval["resolution"], approval["decision"], approval["resolvedAt"]] == [None] * 3
    assert [approval["updatedInput"], approval["message"], approval["decidedBy"]] == [None] * 3
    assert [approval["remember"], approval["interrupt"]] == [False, False]
    assert approval["createdAt"] < approval["expiresAt"]
    assert api.get(f"/api/approvals/{approval['id']}").json == approval
    assert api.get(f"/api/runs/{run['id']}/approvals").json == [approval]
    assert approval in api.get("/api/approvals", status="pending").json
    shown = api.run(run["id"], wait=0)
    assert [shown["approvals"], shown["pendingApprovals"], shown["status"]] == [True, 1, "running"]
    decide(api, approval, "deny")
    assert api.run(run["id"])["pendingApprovals"] == 0


def test_a_run_without_approvals_asks_nothing(api: Client, project: Path) -> None:
    run = api.start(project, script(ask=[BASH]))

    assert run["approvals"] is False
    assert api.messages(run["id"], type="answered")[0]["answer"] == "canUseTool callback is not provided"
    assert api.get(f"/api/runs/{run['id']}/approvals").json == []


def test_a_resume_and_a_fork_can_ask(api: Client, project: Path) -> None:
    first = api.start(project, "Hello.")
    for kind in ("resume", "fork"):
        body = {"sessionId": first["sessionId"], "prompt": script(ask=[BASH]), "approvals": True}
        run = api.post(f"/api/runs/{kind}", body).json
        (approval,) = pending(api, run)
        assert decide(api, approval, "allow").status == 200
        assert api.run(run["id"])["status"] == "completed"


# ---- answers


def test_an_allowed_request_is_executed_unchanged(api: Client, project: Path) -> None:
    approval = ask_one(api, project)
    answer = decide(api, approval, "allow")

    assert answer.status == 200
    assert [answer.json["status"], answer.json["resolution"], answer.json["decision"]] == [
        "allowed",
        "answered",
        "allow",
    ]
    assert answer.json["updatedInput"] is None
    assert answer.json["resolvedAt"] >= approval["createdAt"]
    assert answer_received(api, approval) == {"behavior": "allow", "updatedInput": BASH["input"]}
    assert api.get(f"/api/approvals/{approval['id']}").json == answer.json


def test_a_changed_input_is_executed(api: Client, project: Path) -> None:
    approval = ask_one(api, project)
    changed = {"command": "make test", "deep": [1, 2.5, None, {"\U0001f600": "\x01"}], "big": 2**70}
    answer = decide(api, approval, "allow", updatedInput=changed)

    assert [answer.json["input"], answer.json["updatedInput"]] == [BASH["input"], changed]
    assert answer_received(api, approval) == {"behavior": "allow", "updatedInput": changed}


def test_an_empty_input_is_refused_because_claude_code_would_execute_the_original(api: Client, project: Path) -> None:
    approval = ask_one(api, project)
    assert "leave updatedInput out" in refused(decide(api, approval, "allow", updatedInput={}), "updatedInput")
    assert api.get(f"/api/approvals/{approval['id']}").json["status"] == "pending"
    decide(api, approval, "allow")


def test_claude_code_gets_the_reason_of_a_denial(api: Client, project: Path) -> None:
    approval = ask_one(api, project)
    answer = decide(api, approval, "deny", message="Use ninja.", interrupt=True)

    assert [answer.json["status"], answer.json["resolution"], answer.json["decision"]] == ["denied", "answered", "deny"]
    assert answer.json["message"] == "Use ninja."
    assert answer.json["interrupt"] is True
    assert answer_received(api, approval) == {"behavior": "deny", "message": "Use ninja.", "interrupt": True}


def test_a_denial_without_a_reason_gets_a_default_message(api: Client, project: Path) -> None:
    approval = ask_one(api, project)
    answer = decide(api, approval, "deny")
    assert answer_received(api, approval) == {"behavior": "deny", "message": answer.json["message"]}
    assert answer.json["message"]


def test_a_remembered_decision_applies_to_this_run_and_not_to_the_hosts_settings(api: Client, project: Path) -> None:
    approval = ask_one(api, project, {**BASH, "permission_suggestions": [SUGGESTED, MODE]})
    answer = decide(api, approval, "allow", remember=True, updatedInput={"command": "true"})

    assert answer.json["remember"] is True
    assert answer.json["suggestions"] == [SUGGESTED, MODE]
    assert answer_received(api, approval) == {
        "behavior": "allow",
        "updatedInput": {"command": "true"},
        "updatedPermissions": [{**RULES, "destination": "session"}, MODE],
    }


def test_a_decision_cannot_be_remembered_without_suggestions(api: Client, project: Path) -> None:
    approval = ask_one(api, project)
    refused(decide(api, approval, "allow", remember=True), "remember")
    assert api.get(f"/api/approvals/{approval['id']}").json["status"] == "pending"
    assert decide(api, approval, "allow").status == 200


def test_suggestions_that_the_sdk_cannot_return_are_left_out(api: Client, project: Path) -> None:
    strange = {"type": "tomorrow's", "destination": "session"}
    approval = ask_one(api, project, {**BASH, "permission_suggestions": [SUGGESTED, strange]})

    assert approval["suggestions"] == []
    refused(decide(api, approval, "allow", remember=True), "remember")
    assert decide(api, approval, "allow").status == 200


def test_the_first_of_many_concurrent_answers_counts(api: Client, project: Path) -> None:
    approval = ask_one(api, project)
    barrier = threading.Barrier(8)

    def race(number: int) -> Answer:
        barrier.wait()
        if number % 2:
            return decide(api, approval, "deny", message=f"No, says {number}.")
        return decide(api, approval, "allow", updatedInput={"by": number})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(race, range(8)))
    (first,) = [answer.json for answer in answers if answer.status == 200]
    for answer in answers:
        if answer.status != 200:
            assert [answer.status, answer.error["code"]] == [409, "APPROVAL_ALREADY_RESOLVED"]
            assert answer.json["approval"] == first
            assert f"was answered at {first['resolvedAt']}: it is {first['status']!r}" in answer.error["message"]
    received = answer_received(api, approval)
    assert received.get("message") == first["message"]
    assert received["behavior"] == first["decision"]
    if first["decision"] == "allow":
        assert received["updatedInput"] == first["updatedInput"]


def test_concurrent_requests_are_answered_in_any_order(api: Client, project: Path) -> None:
    questions = [{**BASH, "input": {"n": n}} for n in range(3)]
    run = start_asking(api, project, *questions, at_once=True)
    approvals = sorted(pending(api, run, 3), key=lambda approval: int(approval["input"]["n"]))

    assert api.run(run["id"], wait=0)["pendingApprovals"] == 3
    for approval in reversed(approvals):
        decide(api, approval, "allow", updatedInput={"answer to": approval["input"]["n"]})
    assert api.run(run["id"])["status"] == "completed"
    answers = [
        (m["asked"]["input"]["n"], m["answer"]["updatedInput"]) for m in api.messages(run["id"], type="answered")
    ]
    assert answers == [(n, {"answer to": n}) for n in (2, 1, 0)]


def test_an_answer_carries_the_name_of_its_token(serve_all: ServeFunction, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("alice:alices-token-0123456789\nbob:bobs-token-01234567890123\n")
    tokens.chmod(0o600)
    service = serve_all(CCM_API_TOKEN_FILE=tokens)

    def request_as(token: str, method: str, path: str, body: Any = None) -> Answer:
        return Client(service.url).request(method, path, body, {"Authorization": f"Bearer {token}"})

    alice, bob = "alices-token-0123456789", "bobs-token-01234567890123"
    body = {"cwd": str(folder_of(tmp_path)), "prompt": script(ask=[BASH]), "approvals": True}
    assert request_as(alice, "POST", "/api/runs/start", body).status == 202
    (approval,) = request_as(alice, "GET", "/api/approvals?status=pending&wait=30").json
    assert request_as("nobody", "POST", f"/api/approvals/{approval['id']}", {"decision": "allow"}).status == 401
    answer = request_as(bob, "POST", f"/api/approvals/{approval['id']}", {"decision": "allow"})
    assert [answer.status, answer.json["decidedBy"]] == [200, "bob"]


# ---- without an answer


def test_an_unanswered_request_is_denied_after_its_timeout(api: Client, project: Path) -> None:
    run = start_asking(api, project, BASH, approvalTimeoutMs=300, timeoutMs=60_000)

    assert run["approvalTimeoutMs"] == 300
    assert api.run(run["id"])["status"] == "completed"
    (approval,) = api.get(f"/api/runs/{run['id']}/approvals").json
    assert [approval["status"], approval["resolution"]] == ["denied", "timed_out"]
    assert [approval["decision"], approval["decidedBy"]] == [None, None]
    assert approval["expiresAt"] <= approval["resolvedAt"]
    assert answer_received(api, approval) == {"behavior": "deny", "message": approval["message"]}
    assert "Nobody has answered" in approval["message"]
    late = decide(api, approval, "allow")
    assert [late.status, late.json["approval"]] == [409, approval]
    assert f"was denied at {approval['resolvedAt']}: nobody had answered in time" in late.error["message"]


def test_the_setting_is_the_timeout_if_the_request_has_none(sqlite_api: Client, project: Path) -> None:
    cases: list[tuple[dict[str, Any], int]] = [({}, 45 * 60), ({"approvalTimeoutMs": 7_200_000}, 7200)]
    for fields, seconds in cases:
        approval = ask_one(sqlite_api, project, **fields)
        at = [datetime.fromisoformat(approval[name]) for name in ("createdAt", "expiresAt")]
        # The clock is read once for each of the two.
        assert seconds <= (at[1] - at[0]).total_seconds() < seconds + 60
        decide(sqlite_api, approval, "deny")


def test_the_wait_does_not_count_towards_the_runs_timeout(api: Client, project: Path) -> None:
    # The wait for the answer alone takes as long as the run's timeout.
    run = start_asking(api, project, BASH, approvalTimeoutMs=2_000, timeoutMs=2_000)
    ended = api.run(run["id"])
    assert [ended["status"], ended["error"]] == ["completed", None]
    assert ended["durationMs"] >= 2_000


def test_a_stopping_run_takes_no_answer(api: Client, project: Path) -> None:
    # A Claude Code that ignores the interrupt lives three seconds longer, and nothing may be allowed meanwhile.
    run = api.start(project, script(ask=[BASH], ignore_interrupt=True), wait=0, approvals=True)
    (approval,) = pending(api, run)
    with ThreadPoolExecutor(1) as other:
        cancelled = other.submit(api.delete, f"/api/runs/{run['id']}")
        until(lambda: api.get(f"/api/approvals/{approval['id']}").json["status"] != "pending")
        assert api.run(run["id"], wait=0)["status"] == "running"
        late = decide(api, approval, "allow")

    assert cancelled.result().json["status"] == "cancelled"
    assert [late.status, late.json["approval"]["status"]] == [409, "expired"]
    assert [message for message in api.messages(run["id"]) if message["type"] == "answered"] == []


def test_the_approvals_of_a_cancelled_run_expire(api: Client, project: Path) -> None:
    run = start_asking(api, project, BASH, BASH, at_once=True)
    approvals = pending(api, run, 2)
    with Stream(api, f"/api/runs/{run['id']}/stream") as stream:
        assert [event.type for event in stream.take(2)] == ["approval"] * 2
        cancelled = api.delete(f"/api/runs/{run['id']}")
        rest = list(stream)

    assert [cancelled.status, cancelled.json["status"], cancelled.json["pendingApprovals"]] == [200, "cancelled", 0]
    now = api.get(f"/api/runs/{run['id']}/approvals").json
    assert [(one["id"], one["status"], one["resolution"], one["decision"]) for one in now] == [
        (one["id"], "expired", "withdrawn", None) for one in sorted(approvals, key=lambda one: str(one["createdAt"]))
    ]
    assert [event.json for event in rest if event.type == "approval"] == now
    assert rest[-1].type == "end"
    late = decide(api, now[0], "allow")
    assert [late.status, late.json["approval"]] == [409, now[0]]
    assert f"expired at {now[0]['resolvedAt']}: its run ended" in late.error["message"]
    assert api.get("/api/approvals", status="pending").json == []


def test_approvals_expire_when_claude_code_dies(api: Client, project: Path) -> None:
    approval = ask_one(api, project)
    end_marked(approval["runId"])

    ended = api.run(approval["runId"])
    assert [ended["status"], ended["error"]["code"], ended["pendingApprovals"]] == ["error", "CLI_CRASHED", 0]
    assert api.get(f"/api/approvals/{approval['id']}").json["status"] == "expired"


# ---- the limit: all workers but one


def test_one_worker_is_reserved_for_runs_that_do_not_wait(serve_all: ServeFunction, tmp_path: Path) -> None:
    client = Client(serve_all(CCM_MAX_CONCURRENT_RUNS=2).url)
    folder = folder_of(tmp_path)
    first = start_asking(client, folder, BASH, BASH, at_once=True)
    waiting = pending(client, first, 2)  # one run may have several

    second = client.run(start_asking(client, folder, BASH)["id"])
    assert second["status"] == "completed"
    (denied,) = client.get(f"/api/runs/{second['id']}/approvals").json
    assert [denied["status"], denied["resolution"], denied["decision"]] == ["denied", "no_worker", None]
    late = decide(client, denied, "allow")
    assert [late.status, late.json["approval"]] == [409, denied]
    assert f"was denied at {denied['resolvedAt']} without being asked" in late.error["message"]
    assert "CCM_MAX_CONCURRENT_RUNS" in denied["message"]
    assert answer_received(client, denied) == {"behavior": "deny", "message": denied["message"]}
    for approval in waiting:
        decide(client, approval, "deny")
    client.run(first["id"])
    assert decide(client, ask_one(client, folder), "allow").status == 200


def test_approvals_need_a_second_worker(serve_all: ServeFunction, tmp_path: Path) -> None:
    client = Client(serve_all(CCM_MAX_CONCURRENT_RUNS=1).url)
    body = {"cwd": str(folder_of(tmp_path)), "prompt": "Hello.", "approvals": True}
    message = refused(client.post("/api/runs/start", body), "approvals", 403, "APPROVALS_FORBIDDEN")
    assert "CCM_MAX_CONCURRENT_RUNS" in message


# ---- streams and waits


def test_a_stream_has_the_pending_approvals_and_then_each_change(api: Client, project: Path) -> None:
    run = start_asking(api, project, BASH, {**BASH, "input": {"n": 2}}, messages=[{"type": "assistant", "n": 0}])
    (first,) = pending(api, run)
    paths = [f"/api/runs/{run['id']}/stream", f"/api/sessions/{run['sessionId']}/stream"]
    for path, prefix in zip(paths, ("", f"{run['id']}:"), strict=True):
        with Stream(api, path) as stream:
            requested, message = stream.take(2)
            assert [requested.type, requested.id, requested.json] == ["approval", "", first]
            assert [message.type, message.id] == ["message", f"{prefix}0"]

    with Stream(api, paths[0], "0") as stream, Stream(api, paths[1], f"{run['id']}:0") as whole:
        both = [stream, whole]
        assert [one.take(1)[0].json for one in both] == [first] * 2
        changed = decide(api, first, "allow").json
        for one in both:
            seen: list[Any] = []
            while len(seen) < 2:
                event = one.take(1)[0]
                if event.type == "approval":
                    # It has no id, so the last one stays.
                    assert event.id in ("", "1", f"{run['id']}:1")
                    seen.append(event.json)
            assert seen[0] == changed
            assert [seen[1]["status"], seen[1]["input"]] == ["pending", {"n": 2}]
        decide(api, seen[1], "deny")
        rest = list(stream)
    assert [event.json["status"] for event in rest if event.type == "approval"] == ["denied"]
    assert rest[-1].json == api.run(run["id"])
    # An ended run has no pending approvals. The lists have the earlier ones.
    again = events_of(api, paths[0])
    assert [event.type for event in again] == ["message"] * 4 + ["end"]


def test_a_wait_lasts_until_an_approval_is_requested(api: Client, project: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.get, "/api/approvals", status="pending", wait=60)
        run = start_asking(api, project, BASH)
        answer = waiting.result()
    assert [approval["runId"] for approval in answer.json] == [run["id"]]
    decide(api, answer.json[0], "deny")
    assert api.get("/api/approvals", status="pending", wait=0.05).json == []


def test_a_client_that_has_seen_the_pending_approvals_waits_for_the_next(api: Client, project: Path) -> None:
    first = ask_one(api, project)
    seen = api.get("/api/approvals", status="pending", wait=30)
    assert seen.json == [first]
    assert seen.next is not None
    assert api.get("/api/approvals", status="pending").next is None
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(api.get, seen.next)
        second = ask_one(api, project)
        assert waiting.result().json == [second]
    again = api.get(seen.next.replace("wait=30", "wait=0.05"))
    assert again.json == [second]
    assert again.next is not None
    assert api.get(again.next).json == []
    assert api.get(again.next).next == again.next
    for approval in (first, second):
        decide(api, approval, "deny")


def test_a_reconnecting_client_gets_the_answers_it_missed(api: Client, project: Path) -> None:
    run = start_asking(api, project, BASH, {**BASH, "input": {"n": 2}}, messages=[{"type": "assistant", "n": 0}])
    (first,) = pending(api, run)
    allowed = decide(api, first, "allow").json
    (second,) = pending(api, run)
    paths = [(f"/api/runs/{run['id']}/stream", ""), (f"/api/sessions/{run['sessionId']}/stream", f"{run['id']}:")]
    for path, prefix in paths:
        with Stream(api, path, f"{prefix}0") as stream:
            assert [event.json for event in stream.take(2)] == [allowed, second]
        with Stream(api, path) as stream:
            assert stream.take(1)[0].json == second  # a client that has read nothing knows no pending approval
    denied = decide(api, second, "deny").json
    ended = api.run(run["id"])
    events = events_of(api, paths[0][0], "0")
    assert [event.json for event in events if event.type == "approval"] == [allowed, denied]
    assert events[-1].json == ended
    # Approvals resolved long before the message that was read last are not repeated.
    events = events_of(api, paths[0][0], str(ended["messageCount"] - 1))
    assert allowed not in [event.json for event in events]


def test_lists_are_filtered_by_run_and_session(api: Client, project: Path) -> None:
    first = ask_one(api, project)
    second = ask_one(api, project)
    for field in ("runId", "sessionId"):
        for status in ({}, {"status": "pending"}, {"status": "pending", "wait": 30}):
            assert api.get("/api/approvals", **{field: first[field]}, **status).json == [first]
    assert api.get("/api/approvals", runId=first["runId"], sessionId=second["sessionId"]).json == []
    sdk_session = api.run(first["runId"], wait=0)["sdkSessionId"]
    assert api.get("/api/approvals", sessionId=sdk_session).json == [first]
    for approval in (first, second):
        decide(api, approval, "deny")


def test_lists_are_paged_from_the_oldest(api: Client, project: Path) -> None:
    run = start_asking(api, project, *[{**BASH, "input": {"n": n}} for n in range(5)], at_once=True)
    pending(api, run, 5)
    whole = api.get(f"/api/runs/{run['id']}/approvals").json
    for base in (f"/api/runs/{run['id']}/approvals?limit=2", "/api/approvals?status=pending&limit=2"):
        path: str | None = base
        found = []
        while path is not None:
            answer = api.get(path)
            assert len(answer.json) <= 2
            found += answer.json
            path = answer.next
        assert found == whole
    for approval in whole:
        decide(api, approval, "deny")
    ids = [approval["id"] for approval in api.get("/api/approvals", limit=1000).json]
    assert [approval["id"] for approval in whole] == ids[-5:]
    assert [approval["id"] for approval in api.get("/api/approvals", status="denied", limit=1000).json][-5:] == ids[-5:]


# ---- bad input


BAD_ANSWERS: list[tuple[Any, str | None, str]] = [
    ({}, "decision", "is required"),
    ({"decision": "maybe"}, "decision", "'allow' or 'deny'"),
    ({"decision": None}, "decision", ""),
    ({"decision": True}, "decision", ""),
    ({"decision": "allow", "message": "Yes."}, "message", "deny only"),
    ({"decision": "allow", "interrupt": True}, "interrupt", "deny only"),
    ({"decision": "deny", "updatedInput": {}}, "updatedInput", "allow only"),
    ({"decision": "deny", "remember": True}, "remember", "allow only"),
    ({"decision": "allow", "updatedInput": "make"}, "updatedInput", ""),
    ({"decision": "allow", "updatedInput": [1]}, "updatedInput", ""),
    ({"decision": "allow", "remember": "yes"}, "remember", ""),
    ({"decision": "allow", "remember": 1}, "remember", ""),
    ({"decision": "deny", "interrupt": "no"}, "interrupt", ""),
    ({"decision": "deny", "message": 5}, "message", ""),
    ({"decision": "deny", "message": " "}, "message", "blank"),
    ({"decision": "deny", "message": "a\0b"}, "message", "NUL"),
    ({"decision": "deny", "message": "x" * 100_001}, "message", "at most 100000"),
    ({"decision": "allow", "updated_input": {}}, "updated_input", "did you mean updatedInput?"),
    ([], None, "JSON object"),
    (b"", None, "JSON"),
    (b'{"decision": "allow", "updatedInput": {"x": NaN}}', "updatedInput", "NaN"),
    (b'{"decision": "allow", "updatedInput": {"x": "\\ud800"}}', None, "JSON"),
    (b'{"decision": "allow", "updatedInput": ' + b"[" * 100_000, None, "JSON"),
]


@pytest.fixture(scope="module")
def untouched(api: Client, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Yield a pending approval, and check that it is still pending afterwards."""
    approval = ask_one(api, folder_of(tmp_path_factory.mktemp("untouched")))
    yield approval
    assert api.get(f"/api/approvals/{approval['id']}").json == approval
    assert api.messages(approval["runId"]) == []
    decide(api, approval, "deny")


@pytest.mark.parametrize(("body", "field", "words"), BAD_ANSWERS, ids=lambda value: json.dumps(str(value))[:60])
def test_an_invalid_answer_is_refused(
    api: Client, untouched: dict[str, Any], body: Any, field: str | None, words: str
) -> None:
    message = refused(api.post(f"/api/approvals/{untouched['id']}", body), field)
    assert words in message


def test_answers_to_unknown_approvals_are_refused(api: Client, untouched: dict[str, Any]) -> None:
    path = f"/api/approvals/{untouched['id']}"
    allow = {"decision": "allow"}
    refused(api.post(f"/api/approvals/{NOWHERE}", allow), None, 404, "APPROVAL_NOT_FOUND")
    refused(api.get(f"/api/approvals/{NOWHERE}"), None, 404, "APPROVAL_NOT_FOUND")
    refused(api.get(f"/api/runs/{NOWHERE}/approvals"), None, 404, "RUN_NOT_FOUND")
    refused(api.post("/api/approvals/a%00b", allow), "approvalId")
    refused(api.post(f"{path}?wait=1", allow), "wait")
    refused(api.get("/api/approvals", status="open"), "status")
    refused(api.get("/api/approvals", wait="x"), "wait")
    refused(api.get("/api/approvals", cursor="x"), "cursor")
    refused(api.get("/api/approvals", runId=NOWHERE), None, 404, "RUN_NOT_FOUND")
    refused(api.get("/api/approvals", sessionId=NOWHERE), None, 404, "SESSION_NOT_FOUND")
    refused(api.get("/api/approvals", toolName="Bash"), "toolName")
    plain = {"Content-Type": "text/plain"}
    refused(api.request("POST", path, allow, plain), None, 415, "UNSUPPORTED_MEDIA_TYPE")
    assert api.request("PUT", path, allow).status == 405
    assert api.delete("/api/approvals").status == 405
