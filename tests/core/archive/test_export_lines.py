"""Reading an export: invalid lines are refused with their number."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from ccm.core.archive.importing import Importer
from ccm.core.archive.lines import LineSource
from ccm.core.archive.records import SourceError
from ccm.db.driver.database import Database
from tests.core.archive.history import at, uuid_of

SESSION: dict[str, Any] = {
    "type": "session",
    "sessionId": uuid_of(1),
    "parentSessionId": None,
    "forkedFromRunId": None,
    "cwd": "/srv",
    "title": None,
    "metadata": {},
}
RUN: dict[str, Any] = {
    "type": "run",
    "runId": uuid_of(2),
    "sessionId": uuid_of(1),
    "sdkSessionId": uuid_of(1),
    "parentSessionId": None,
    "parentRunId": None,
    "mode": "fresh",
    "status": "completed",
    "cwd": "/srv",
    "prompt": "Hi",
    "options": {},
    "imageCount": 0,
    "timeoutMs": 60_000,
    "approvals": True,
    "approvalTimeoutMs": 1_000,
    "webhookUrl": "https://example.com/hook",
    "resultType": None,
    "result": None,
    "error": None,
    "costUsd": None,
    "messageCount": 1,
    "durationMs": None,
    "transcriptStored": True,
    "createdBy": None,
    "createdAt": at(1),
    "startedAt": at(1),
    "endedAt": at(1),
    "seq": 1,
    "forkAtMessage": None,
    "forkAtIndex": None,
    "hasTranscript": True,
    "idempotencyKey": None,
    "requestDigest": None,
}
MESSAGE: dict[str, Any] = {
    "type": "message",
    "runId": uuid_of(2),
    "index": 0,
    "createdAt": at(1),
    "message": {"type": "result"},
}
TRANSCRIPT: dict[str, Any] = {
    "type": "transcript",
    "sdkSessionId": uuid_of(1),
    "projectKey": "-srv",
    "subpath": "subagents/agent-a1",
    "updatedAtMs": 1,
    "index": 0,
    "entries": [{"uuid": uuid_of(5)}],
}
LINES = [SESSION, RUN, MESSAGE, TRANSCRIPT, {"type": "end", "sessions": 1, "runs": 1}]
APPROVAL: dict[str, Any] = {
    "type": "approval",
    "approvalId": uuid_of(6),
    "runId": uuid_of(2),
    "toolName": "Bash",
    "toolUseId": None,
    "input": {"command": "make"},
    "suggestions": [{"type": "setMode"}],
    "status": "allowed",
    "resolution": "answered",
    "updatedInput": {"command": "true"},
    "remember": False,
    "message": None,
    "interrupt": False,
    "decidedBy": "alice",
    "createdAt": at(1),
    "expiresAt": at(2),
    "resolvedAt": at(1),
}
HEADER = {"type": "export", "format": "cc-manager", "version": 1, "lastSeq": 1}


def import_lines(database: Database, lines: list[dict[str, Any] | str], warnings: list[str] | None = None) -> None:
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in [HEADER, *lines])
    source = LineSource(io.BytesIO(text.encode("utf-8", "surrogatepass")), "it")
    Importer(database, lambda _cwd, _id: False, ([] if warnings is None else warnings).append).run(source)


def count_sessions(database: Database) -> int:
    return int(database.rows("SELECT COUNT(*) AS n FROM ccr_sessions")[0]["n"])


def test_valid_lines_are_imported(writable: Database) -> None:
    import_lines(writable, list(LINES))
    assert count_sessions(writable) == 1
    # The lines have no main transcript, so none is recorded as stored.
    assert writable.rows('SELECT "transcriptStored" AS stored, "messageCount" AS n FROM ccr_runs') == [
        {"stored": 0, "n": 1}
    ]


CHANGES: list[tuple[int, dict[str, Any], str]] = [
    (2, {"sessionId": 7}, "sessionId must be a text"),
    (2, {"sessionId": "../../etc/passwd"}, "sessionId must be an id"),
    (2, {"sessionId": "-rf"}, "sessionId must be an id"),
    (2, {"sessionId": None}, "sessionId must be a text"),
    (2, {"parentSessionId": uuid_of(9)}, "neither before it nor here"),
    (2, {"title": "\0"}, "title must be a text that can be stored"),
    (2, {"cwd": "\ud800"}, "cwd must be a text that can be stored"),
    (2, {"metadata": []}, "metadata must be an object"),
    (2, {"type": "sesion"}, "type 'sesion' must not be here"),
    (3, {"runId": {"a": 1}}, "runId must be a text"),
    (3, {"runId": "a/b"}, "runId must be an id"),
    (3, {"runId": "start"}, "runId must not be 'start'"),
    (3, {"sessionId": uuid_of(8)}, "must follow the line of its session"),
    (3, {"sdkSessionId": "../x"}, "sdkSessionId must be an id"),
    (3, {"sdkSessionId": "a-title"}, "sdkSessionId must be a UUID"),
    (3, {"parentRunId": uuid_of(9)}, "neither before it nor here"),
    (3, {"mode": "sideways"}, "mode must be one of"),
    (3, {"status": "great"}, "status must be one of"),
    (3, {"seq": "1"}, "seq must be a whole number"),
    (3, {"seq": True}, "seq must be a whole number"),
    (3, {"seq": 2**62}, "seq must be a whole number"),
    (3, {"messageCount": -1}, "messageCount must not be negative"),
    (3, {"timeoutMs": "30m"}, "timeoutMs must be a whole number"),
    (3, {"result": [1]}, "result must be an object"),
    (3, {"error": "x"}, "error must be an object"),
    (3, {"costUsd": "0.1"}, "costUsd must be a number"),
    (3, {"hasTranscript": 1}, "hasTranscript must be true or false"),
    (3, {"prompt": None}, "prompt must be a text"),
    (3, {"messageCount": 2}, "a part of it is missing"),
    (4, {"runId": uuid_of(7)}, "message 0 of run"),
    (4, {"index": 1}, "message 0 of run"),
    (4, {"message": "x"}, "message must be an object"),
    (4, {"type": "massage"}, "a part of it is missing"),
    (5, {"sdkSessionId": uuid_of(7)}, "must be that of the run before it"),
    (5, {"subpath": "../../.bashrc"}, "must stay within"),
    (5, {"subpath": "/etc/passwd"}, "must stay within"),
    (5, {"subpath": "subagents//x"}, "must stay within"),
    (5, {"subpath": "a\nb"}, "must stay within"),
    (5, {"projectKey": ".."}, "must stay within"),
    (5, {"projectKey": "a/b"}, "must stay within"),
    (5, {"projectKey": ""}, "must stay within"),
    (5, {"entries": ["x"]}, "entries must be an array of objects"),
    (5, {"index": 3}, "entry 0 of its transcript"),
    (6, {"runs": 2}, "a part of the file is missing"),
    (6, {"type": "The End"}, "must not be here"),
]


@pytest.mark.parametrize(
    ("number", "change", "message"), CHANGES, ids=[f"{n} {list(c.items())}" for n, c, _ in CHANGES]
)
def test_an_invalid_line_is_named(writable: Database, number: int, change: dict[str, Any], message: str) -> None:
    lines: list[dict[str, Any] | str] = list(LINES)
    lines[number - 2] = {**LINES[number - 2], **change}

    warnings: list[str] = []
    with pytest.raises(SourceError, match=r"Line|The import is incomplete") as refused:
        import_lines(writable, lines, warnings)

    # The warning about a run that does not fit comes before the errors of the lines after it.
    sentence = (warnings or [str(refused.value)])[0]
    assert sentence.startswith(("Line", "Run"))
    assert message in sentence
    assert count_sessions(writable) == (1 if number == 6 else 0)


def stored_approvals(writable: Database) -> list[Any]:
    rows = writable.rows('SELECT id, status, resolution, "resolvedAt" FROM ccr_approvals ORDER BY seq')
    return [tuple(row.values()) for row in rows]


def test_approvals_are_imported_with_their_run(writable: Database) -> None:
    late = {**APPROVAL, "approvalId": uuid_of(7), "status": "denied", "resolution": "timed_out"}
    import_lines(writable, [*LINES[:3], APPROVAL, late, *LINES[3:]])
    assert stored_approvals(writable) == [
        (uuid_of(6), "allowed", "answered", at(1)),
        (uuid_of(7), "denied", "timed_out", at(1)),
    ]


def test_a_pending_approval_is_imported_as_expired(writable: Database) -> None:
    waiting = {**APPROVAL, "status": "pending", "resolution": None, "resolvedAt": None}
    import_lines(writable, [*LINES[:3], waiting, *LINES[3:]])
    assert stored_approvals(writable) == [(uuid_of(6), "expired", "withdrawn", at(1))]


def test_a_run_with_an_approval_of_another_run_is_left_out(writable: Database) -> None:
    import_lines(writable, [*LINES[:3], APPROVAL, *LINES[3:]])
    own = {"sessionId": uuid_of(30), "sdkSessionId": uuid_of(30), "runId": uuid_of(31)}
    other = [{**line, **{name: own[name] for name in own.keys() & line.keys()}} for line in (*LINES[:3], APPROVAL)]
    warnings: list[str] = []
    with pytest.raises(SourceError, match="The import is incomplete"):
        import_lines(writable, [*other, LINES[-1]], warnings)
    assert [sentence.endswith("is here already, of another run.") for sentence in warnings] == [True]
    assert count_sessions(writable) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runId": uuid_of(9)}, "an approval of run"),
        ({"approvalId": "a/b"}, "approvalId must be an id"),
        ({"approvalId": None}, "approvalId must be a text"),
        ({"toolName": None}, "toolName must be a text"),
        ({"title": "\0"}, "title must be a text that can be stored"),
        ({"input": "make"}, "input must be an object"),
        ({"suggestions": None}, "suggestions must be an array of objects"),
        ({"suggestions": ["x"]}, "suggestions must be an array of objects"),
        ({"status": "maybe"}, "status must be one of"),
        ({"resolution": "maybe"}, "resolution must be one of"),
        ({"resolution": None}, "resolution must be"),
        ({"updatedInput": []}, "updatedInput must be an object"),
        ({"remember": 1}, "remember must be true or false"),
        ({"interrupt": None}, "interrupt must be true or false"),
        ({"expiresAt": None}, "expiresAt must be a text"),
    ],
)
def test_an_invalid_approval_is_named(writable: Database, change: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=r"Line 5: ") as refused:
        import_lines(writable, [*LINES[:3], {**APPROVAL, **change}, *LINES[3:]])
    assert message in str(refused.value)
    assert count_sessions(writable) == 0


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", '"x"', "", "[" * 100_000, '{"type":"message","index":' + "9" * 5000 + "}", "\ud800"],
)
def test_a_line_that_is_no_json_object_is_named(writable: Database, line: str) -> None:
    with pytest.raises(SourceError, match="Line 4: "):
        import_lines(writable, [SESSION, RUN, line + "\n", TRANSCRIPT, LINES[-1]])
    assert count_sessions(writable) == 0


def test_nothing_follows_the_end(writable: Database) -> None:
    with pytest.raises(SourceError, match="Line 7: there must be nothing after"):
        import_lines(writable, [*LINES, SESSION])


def test_a_parent_in_another_tree_is_refused(writable: Database) -> None:
    import_lines(writable, list(LINES))
    stranger = {**SESSION, "sessionId": uuid_of(20)}
    run = {**RUN, "runId": uuid_of(21), "sessionId": uuid_of(20), "sdkSessionId": uuid_of(20), "messageCount": 0}
    run |= {"mode": "fork", "parentRunId": uuid_of(2), "seq": 2}

    warnings: list[str] = []
    with pytest.raises(SourceError, match="The import is incomplete"):
        import_lines(writable, [stranger, run, {"type": "end", "sessions": 1, "runs": 1}], warnings)
    assert [sentence.endswith("is in no session that its own was forked from.") for sentence in warnings] == [True]
    assert count_sessions(writable) == 1
