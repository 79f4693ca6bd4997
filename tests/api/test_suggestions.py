"""Answers that help: what a client meant by an unknown name, value, path or method."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import NOWHERE, refused
from tests.api.in_process import InProcessService
from tests.client import Client

RIGHT = {
    "start": {"cwd": "/", "prompt": "Hello."},
    "resume": {"sessionId": NOWHERE, "prompt": "Hello."},
    "fork": {"sessionId": NOWHERE, "prompt": "Hello."},
}
AGENT = {"description": "Reviews.", "prompt": "Review."}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with InProcessService(tmp_path_factory.mktemp("suggestions")) as running:
        yield running.client


@pytest.mark.parametrize(
    ("kind", "field", "value", "words"),
    [
        # Options at the top level.
        ("start", "model", "opus", "did you mean options.model?"),
        ("resume", "allowedTools", ["Read"], "did you mean options.allowedTools?"),
        ("fork", "allowed_tools", ["Read"], "did you mean options.allowedTools?"),
        ("start", "permission-mode", "plan", "did you mean options.permissionMode?"),
        ("start", "maxTurn", 1, "did you mean options.maxTurns?"),
        # Other spellings and words.
        ("start", "timeout_ms", 1, "did you mean timeoutMs?"),
        ("start", "webhook_url", "http://h/", "did you mean webhookUrl?"),
        ("fork", "at_run_id", NOWHERE, "did you mean atRunId?"),
        ("resume", "if_busy", "reject", "did you mean ifBusy?"),
        ("start", "name", "x", "did you mean title?"),
        ("start", "tags", {}, "did you mean metadata?"),
        # Fields of another action, and what no client sets.
        ("start", "session_id", NOWHERE, "here; sessionId is for POST /api/runs/resume and POST /api/runs/fork."),
        ("resume", "cwd", "/", "here; cwd is for POST /api/runs/start and POST /api/runs/fork."),
        ("start", "resume", NOWHERE, "POST /api/runs/resume continues a session."),
        ("fork", "forkSession", True, "every continuation is a fork."),
        # Nothing is like it.
        (
            "start",
            "zzz",
            1,
            "; the known ones are title, metadata, prompt, images, options, timeoutMs, webhookUrl, approvals, "
            "approvalTimeoutMs, cwd.",
        ),
        # Sent in another way.
        ("start", "wait", 60, "add ?wait=SECONDS to the address."),
        ("start", "idempotency_key", "x", "send it as the header Idempotency-Key."),
        ("resume", "stream", True, "GET /api/runs/{runId}/stream follows a run."),
    ],
)
def test_an_unknown_field(service: Client, kind: str, field: str, value: Any, words: str) -> None:
    message = refused(service.post(f"/api/runs/{kind}", RIGHT[kind] | {field: value}), field)
    assert message.startswith(f"{field} is not a known field")
    assert message.endswith(words)


@pytest.mark.parametrize(
    ("kind", "given", "field", "words"),
    [
        ("start", {"directory": "/", "prompt": "x"}, "directory", "did you mean cwd?"),
        ("start", {"cwd": "/", "message": "x"}, "message", "did you mean prompt?"),
        ("resume", {"session_id": NOWHERE, "prompt": "x"}, "session_id", "did you mean sessionId?"),
        ("fork", {"sessionID": NOWHERE, "prompt": "x"}, "sessionID", "did you mean sessionId?"),
        ("start", {"prompt": "x", "model": "opus"}, "cwd", "is required."),
    ],
)
def test_a_required_field_under_another_name(
    service: Client, kind: str, given: dict[str, Any], field: str, words: str
) -> None:
    assert refused(service.post(f"/api/runs/{kind}", given), field).endswith(words)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"options": {"mcp_servers": {}}}, "options.mcp_servers", "did you mean mcpServers?"),
        ({"options": {"prompt": "x"}}, "options.prompt", "did you mean prompt, outside of options?"),
        ({"options": {"timeoutMs": 1}}, "options.timeoutMs", "did you mean timeoutMs, outside of options?"),
        ({"options": {"fork_session": True}}, "options.fork_session", "every continuation is a fork."),
        (
            {"options": {"agents": {"a": AGENT | {"max_turns": 1}}}},
            "options.agents.a.max_turns",
            "did you mean maxTurns?",
        ),
        (
            {"options": {"thinking": {"type": "enabled", "budgetTokens": 1, "budget_tokens": 1}}},
            "options.thinking.budget_tokens",
            "did you mean budgetTokens?",
        ),
        (
            {"options": {"outputFormat": {"type": "json_schema", "jsonSchema": {}}}},
            "options.outputFormat.jsonSchema",
            "did you mean schema?",
        ),
        ({"images": [{"media_type": "image/png", "data": "x"}]}, "images.0.media_type", "did you mean mediaType?"),
    ],
)
def test_an_unknown_field_within_another(service: Client, fields: dict[str, Any], field: str, words: str) -> None:
    assert refused(service.post("/api/runs/start", RIGHT["start"] | fields), field).endswith(words)


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"options": {"permissionMode": "accept_edits"}}, "options.permissionMode", "did you mean acceptEdits?"),
        ({"options": {"permissionMode": "bypass"}}, "options.permissionMode", "did you mean bypassPermissions?"),
        ({"options": {"permissionMode": "zzz"}}, "options.permissionMode", "'bypassPermissions' or 'auto'."),
        ({"options": {"allowedTools": "Bash"}}, "options.allowedTools", 'did you mean ["Bash"]?'),
        ({"options": {"thinking": {"type": "on"}}}, "options.thinking", "'adaptive', 'enabled' or 'disabled'."),
        ({"options": {"thinking": "high"}}, "options.thinking", "must be an object with type, display, budgetTokens."),
        ({"options": {"maxTurns": "5"}}, "options.maxTurns", "did you mean 5, without quotes?"),
        ({"approvals": "true"}, "approvals", "did you mean true, without quotes?"),
        ({"images": ["/x.png"]}, "images.0", "must be an object with mediaType, data."),
        ({"options": []}, "options", "input should be an object."),
        ({"options": {"systemPrompt": {"append": "x"}}}, "options.systemPrompt", "'custom' or 'preset'."),
    ],
)
def test_an_unknown_value_in_a_body(service: Client, fields: dict[str, Any], field: str, words: str) -> None:
    assert refused(service.post("/api/runs/start", RIGHT["start"] | fields), field).endswith(words)


def test_an_unknown_decision(service: Client) -> None:
    message = refused(service.post(f"/api/approvals/{NOWHERE}", {"allow": True}), "allow")
    assert message.endswith("did you mean decision?")
    for given, meant in (("approve", "allow"), ("rejected", "deny"), ("Allow", "allow")):
        message = refused(service.post(f"/api/approvals/{NOWHERE}", {"decision": given}), "decision")
        assert message.endswith(f"did you mean {meant}?")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("/api/runs?status=", "failed", "must be one of running, completed, error, cancelled; did you mean error?"),
        ("/api/runs?status=", "canceled", "did you mean cancelled?"),
        ("/api/runs?status=", "Completed", "did you mean completed?"),
        ("/api/runs?status=", "queued", "did you mean running?"),
        ("/api/runs?status=", "zzz", "must be one of running, completed, error, cancelled."),
        ("/api/runs?mode=", "forked", "did you mean fork?"),
        ("/api/runs?errorCode=", "timed_out", "did you mean TIMEOUT?"),
        (
            "/api/runs?errorCode=",
            "NOPE",
            "OPTIONS_UNUSABLE, MESSAGE_TOO_LARGE, SESSION_NOT_RESUMABLE, EXECUTION_ERROR.",
        ),
        ("/api/runs?fields=", "id", "fields: must be summary."),
        ("/api/approvals?status=", "approved", "did you mean allowed?"),
    ],
)
def test_an_unknown_value_of_a_parameter(service: Client, path: str, value: str, words: str) -> None:
    field = path.partition("?")[2].rstrip("=")
    assert refused(service.get(path + value), field).endswith(words)


def test_a_body_that_is_empty(service: Client) -> None:
    for body in (b"", b"  \n"):
        answer = service.request("POST", "/api/runs/start", body, {"Content-Type": "application/json"})
        assert refused(answer) == "The body is empty; send a JSON object."


def test_an_unknown_parameter(service: Client) -> None:
    message = refused(service.get("/api/runs?session_id=x"), "session_id")
    assert "it takes createdBy, since," in message
    assert message.endswith("did you mean sessionId?")
    for path, name, meant in (
        ("/api/runs", "page", "; did you mean cursor?"),
        ("/api/runs", "sort", "; did you mean order?"),
        ("/api/runs", "q", "; did you mean GET /api/sessions?q=WORDS?"),
        ("/api/runs", "search", "; did you mean GET /api/sessions?q=WORDS?"),
        ("/api/sessions", "search", "; did you mean q?"),
        ("/api/runs", "metadata[ticket]", "; did you mean metadata.ticket?"),
        ("/api/runs", "model", ", cursor, status, sessionId, cwd, mode, errorCode, waiting."),
    ):
        assert refused(service.get(f"{path}?{name}=2"), name).endswith(meant)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("/api/runs/", "/api/runs or /api/runs/{runId}"),
        ("/api/runs//messages", "/api/runs/{runId}/messages"),
        ("/api/sessions//", "/api/sessions"),
        (f"/api/runs/{NOWHERE}/messages/", f"/api/runs/{NOWHERE}/messages"),
        ("/api//runs", "/api/runs"),
        ("/api/runs/start/", "/api/runs/start"),
        ("/runs/start", "/api/runs/start"),
        ("/api/run/start", "/api/runs/start"),
        (f"/API/Session/{NOWHERE}", f"/api/sessions/{NOWHERE}"),
        (f"/api/runs/{NOWHERE}/message", f"/api/runs/{NOWHERE}/messages"),
        ("/healthz", "/health"),
        ("/api/health", "/health"),
        ("/v1/runs", "/api/runs"),
        (f"/api/v2/runs/{NOWHERE}", f"/api/runs/{NOWHERE}"),
        (f"/api/runs/{NOWHERE}/resume", "/api/runs/resume"),
        (f"/api/sessions/{NOWHERE}/fork", "/api/runs/fork"),
    ],
)
def test_an_unknown_path(service: Client, given: str, meant: str) -> None:
    for method in ("GET", "POST"):
        message = refused(service.request(method, given), None, 404, "NOT_FOUND")
        assert message == f"There is nothing at {given}; did you mean {meant}? GET / lists the endpoints."


def test_an_unknown_path_below_one_that_exists(service: Client) -> None:
    message = refused(service.post(f"/api/runs/{NOWHERE}/cancel", {}), None, 404, "NOT_FOUND")
    assert f"; /api/runs/{NOWHERE} takes DELETE, GET, HEAD." in message


@pytest.mark.parametrize("path", ["/nothing/here", "/a" * 30_000, "/%FF/"])
def test_a_path_that_is_like_none(service: Client, path: str) -> None:
    assert refused(service.get(path), None, 404, "NOT_FOUND").endswith(". GET / lists the endpoints.")


@pytest.mark.parametrize(
    ("method", "path", "words"),
    [
        (
            "POST",
            "/api/runs",
            "which takes GET, HEAD. Did you mean POST /api/runs/start, POST /api/runs/resume or POST /api/runs/fork?",
        ),
        ("POST", f"/api/runs/{NOWHERE}", "Did you mean POST /api/runs/{runId}/input?"),
        ("PATCH", "/", "which takes GET, HEAD. GET / lists"),
        ("DELETE", "/api/runs", "Did you mean DELETE /api/runs/{runId}?"),
        ("PATCH", "/api/sessions", "Did you mean PATCH /api/sessions/{sessionId}?"),
        ("GET", "/api/runs/start", "GET is not possible at /api/runs/start, which takes POST. GET / lists"),
    ],
)
def test_a_method_that_a_path_does_not_take(service: Client, method: str, path: str, words: str) -> None:
    assert words in refused(service.request(method, path), None, 405, "METHOD_NOT_ALLOWED")


def test_allow_is_the_same_on_options_and_on_405(service: Client) -> None:
    for endpoint in service.get("/").json["endpoints"]:
        path = endpoint["path"].replace("{", "").replace("}", "")
        allowed = {method: service.request(method, path).headers["Allow"] for method in ("OPTIONS", "PUT", "BREW")}
        assert len(set(allowed.values())) == 1, path
        assert endpoint["method"] in allowed["OPTIONS"].split(", ")
    assert service.request("OPTIONS", "/api/runs/start").headers["Allow"] == "POST"


def test_the_index_writes_parameters_in_one_way(service: Client) -> None:
    paths = [endpoint["path"] for endpoint in service.get("/").json["endpoints"]]
    assert "/api/sessions/{sessionId}/messages" in paths
    assert not any(character in path for path in paths for character in ":<>")


def test_the_id_of_the_other_kind_is_named(service: Client, project: Path) -> None:
    run = service.start(project, "Hello.")
    run_id, session = run["id"], run["sessionId"]

    for path in ("", "/stream", "/approvals", "/deliveries"):
        message = refused(service.get(f"/api/runs/{session}{path}"), None, 404, "RUN_NOT_FOUND")
        assert message.startswith(f"There is no run {session}: it is a session.")
    answers = [service.get(f"/api/sessions/{run_id}{path}") for path in ("", "/messages", "/runs", "/forks")]
    answers += [service.post(f"/api/runs/{kind}", {"sessionId": run_id, "prompt": "x"}) for kind in ("resume", "fork")]
    for answer in answers:
        message = refused(answer, None, 404, "SESSION_NOT_FOUND")
        assert message == f"There is no session {run_id}: it is a run of session {session}."
