"""A small database with a row in every table, on which the contract tests call the functions of `ccm.db`.

Session `s` has the ended run `e` and the started run `r`, which waits for the approval `a`. Session `f` is a fork of
`s`, and its run `w` is queued. Session `o` has a run `x` that a service started before it was killed.
"""

from __future__ import annotations

from typing import Any

from ccm.db import approvals, deliveries, events, messages, runs, sessions, transcripts
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.models import Message

AT = "2026-03-01T10:00:00.000Z"
LATER = "2026-03-01T11:00:00.000Z"
OWNER = "me"
METADATA = '{"team":"docs","ticket":7}'
ANSWER = '{"message":{"content":[{"type":"text","text":"Parrots live here."}]}}'
KEY = TranscriptKey("s-sdk", "-srv-project")
SUBAGENT = TranscriptKey("s-sdk", "-srv-project", "subagents/agent-1")


def run_row(run_id: str, seq: int, session_id: str, **columns: Any) -> dict[str, Any]:
    row = {"id": run_id, "seq": seq, "cwd": "/srv", "sessionId": session_id, "sdkSessionId": f"{run_id}-sdk"}
    row |= {"mode": "fresh", "status": "running", "prompt": "Hello", "optionsJson": "{}", "imageCount": 0}
    return row | {"createdAt": AT} | columns


def session_row(session_id: str, seq: int, **columns: Any) -> dict[str, Any]:
    row = {"id": session_id, "cwd": "/srv", "title": "Docs", "metadataJson": "{}", "lastRunSeq": seq}
    return row | {"firstRunAt": AT, "lastRunAt": AT} | columns


def approval_row(approval_id: str, **columns: Any) -> dict[str, Any]:
    row = {"id": approval_id, "runId": "r", "sessionId": "s", "toolName": "Bash", "inputJson": "{}", "remember": 0}
    row |= {"suggestionsJson": "[]", "status": "pending", "interrupt": 0, "createdAt": AT, "expiresAt": LATER}
    return row | columns


def message(run_id: str, session_id: str, index: int, kind: str, text: str = "{}") -> Message:
    return Message(run_id, session_id, index, kind, text, AT)


def fill(database: Database) -> None:
    with database.transaction() as transaction:
        _fill(transaction)


def _fill(transaction: Transaction) -> None:
    sessions.insert(transaction, session_row("s", 1, runCount=2, metadataJson=METADATA, createdBy="ann"))
    ended = {"idempotencyKey": "key", "requestDigest": "digest", "sdkSessionId": KEY.sdk_session_id}
    ended |= {"createdBy": "ann", "errorCode": "TIMED_OUT"}
    runs.insert(transaction, run_row("e", 1, "s", **ended), None)
    recorded = [message("e", "s", index, kind) for index, kind in enumerate(("system", "assistant", "result"))]
    recorded[1] = recorded[1]._replace(json=ANSWER)
    messages.insert_many(transaction, recorded)
    runs.end(transaction, runs.get(transaction, "e"), {"status": "completed", "messageCount": 3, "hasTranscript": 1})
    sessions.run_ended(transaction, "s", 3, 0.5, "e")
    transcripts.append(transaction, KEY, [Entry("u1", '{"sessionId":"s-sdk"}'), Entry(None, "{}")])
    transcripts.append(transaction, SUBAGENT, [Entry("u2", "{}")])

    runs.insert(transaction, run_row("r", 2, "s", mode="resume", imageCount=1, approvals=1), "[]")
    runs.start(transaction, runs.get(transaction, "r"), "e", OWNER)
    messages.insert_many(transaction, [message("r", "s", index, "assistant", f'{{"n":{index}}}') for index in (0, 1)])
    for approval_id in "ab":
        approvals.insert(transaction, approval_row(approval_id))
    run = runs.get(transaction, "r")
    events.insert(transaction, "run.started", run)
    deliveries.insert(transaction, "r", "run", "evt_1", "h:80", reason=None, now=AT)
    deliveries.insert(transaction, "r", "service", "evt_2", "", reason=None, now=AT)
    approvals.resolve(transaction, "b", {"status": "denied", "resolvedAt": LATER})
    events.insert(transaction, "approval.resolved", run, approvals.get(transaction, "b").to_json())
    deliveries.insert(transaction, "e", "service", "evt_3", "h:80", reason="gone", now=AT)
    deliveries.insert(transaction, "r", "run", "evt_4", "h:80", reason=None, now=AT)

    sessions.insert(transaction, session_row("f", 3, parentSessionId="s", forkedFromRunId="e"))
    fork = run_row("w", 3, "f", mode="fork", parentRunId="e", parentSessionId="s", forkAtIndex=1)
    runs.insert(transaction, fork, None)
    sessions.insert(transaction, session_row("o", 4))
    runs.insert(transaction, run_row("x", 4, "o"), None)
    runs.start(transaction, runs.get(transaction, "x"), None, "another service")
