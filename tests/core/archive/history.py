"""A history for the tests of export, import and prune, and a handmade database of the original service."""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ccm.db import approvals, messages, runs, sessions, transcripts
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.migrate import migrate
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.json_text import to_json_text
from ccm.models import Message

ODD = {
    "type": "assistant",
    "text": "NUL \0, half a pair \ud83d, a whole one \U0001f600, \u00e9",
    "n": [1.5, 10**30, -0.0],
}
ROOT, FORK, OTHER = (str(uuid.UUID(int=number)) for number in (1, 2, 3))
SECRET = "sk-very-secret-4711"
# The columns of an approval, without those that name its run.
APPROVAL = {
    "toolName": "Bash",
    "toolUseId": "toolu_1",
    "inputJson": to_json_text({"command": "make", "odd": "\0\ud83d"}),
    "suggestionsJson": to_json_text([{"type": "setMode", "mode": "acceptEdits", "destination": "session"}]),
    "title": None,
    "displayName": "Bash",
    "description": "make",
    "blockedPath": "/srv/x",
    "decisionReason": "It is not read-only.",
    "agentId": "agent-1",
    "status": "allowed",
    "resolution": "answered",
    "updatedInputJson": to_json_text({"command": f"make {SECRET}"}),
    "remember": 1,
    "message": None,
    "interrupt": 0,
    "decidedBy": "alice",
    "createdAt": "2026-03-01T10:01:01.000Z",
    "expiresAt": "2026-03-01T11:01:01.000Z",
    "resolvedAt": "2026-03-01T10:01:02.000Z",
}
DENIAL = {
    "status": "denied",
    "resolution": "timed_out",
    "updatedInputJson": None,
    "remember": 0,
    "message": "No.",
    "interrupt": 1,
    "decidedBy": None,
    "toolUseId": None,
}


def uuid_of(number: int) -> str:
    return str(uuid.UUID(int=number))


def at(minute: int) -> str:
    return f"2026-03-01T10:{minute:02}:00.000Z"


@contextmanager
def writing(url: str) -> Iterator[Database]:
    """Open a database for writing until the end of the block. Create it if there is none."""
    sqlite_file.prepare(url)
    with closing(Database(url, writable=True, pool_size=1)) as database:
        migrate(database)
        yield database


def add_session(database: Database, session_id: str, **columns: Any) -> None:
    given = {"cwd": "/srv/project", "title": None, "metadataJson": "{}", "parentSessionId": None, **columns}
    given = {"forkedFromRunId": None, "firstRunAt": at(0), "lastRunAt": at(0), **given}
    with database.transaction() as transaction:
        # Of the session's first run, which tests add in the order of their sessions.
        given = {"lastRunSeq": transaction.value("SELECT COUNT(*) + 1 FROM ccr_sessions"), **given}
        sessions.insert(transaction, {"id": session_id, "runCount": 0, **given})


def add_run(
    database: Database, session_id: str, seq: int, sent: Iterable[Mapping[str, Any]] = (), **columns: Any
) -> str:
    """Store an ended run, and return its id.

    Args:
        sent: its messages.
        columns: columns of the run. Also `transcript`: entries by subpath, and `approvals_of_run`: columns by approval.
    """
    sent = list(sent)
    run_id: str = columns.get("id", uuid_of(1000 + seq))
    entries = columns.pop("transcript", None)
    approvals_of_run = columns.pop("approvals_of_run", ())
    row = {
        "id": run_id,
        "seq": seq,
        "cwd": "/srv/project",
        "sessionId": session_id,
        "sdkSessionId": uuid_of(2000 + seq),
        "parentSessionId": None,
        "parentRunId": None,
        "mode": "fresh",
        "status": "completed",
        "prompt": f"Prompt {seq}",
        "optionsJson": to_json_text({"model": "opus"}),
        "imageCount": 0,
        "timeoutMs": 60_000 * seq,
        "approvals": seq % 2,
        "approvalTimeoutMs": 1_000 * seq,
        "webhookUrl": "https://example.com/hook",
        "forkAtMessage": None,
        "forkAtIndex": None,
        "resultType": "success",
        "resultJson": to_json_text({"type": "result", "subtype": "success", "total_cost_usd": 0.1 * seq}),
        "errorCode": None,
        "errorMessage": None,
        "costUsd": 0.1,
        "messageCount": len(sent),
        "hasTranscript": 1,
        "transcriptStored": int(entries is not None),
        "durationMs": 1234,
        "createdBy": None,
        "createdAt": at(seq),
        "startedAt": at(seq),
        "endedAt": at(seq),
        **columns,
    }
    with database.transaction() as transaction:
        runs.insert(transaction, row, None)
        texts = [(message.get("type", "unknown"), to_json_text(message)) for message in sent]
        batch = [Message(run_id, session_id, index, kind, text, at(seq)) for index, (kind, text) in enumerate(texts)]
        if batch:
            messages.insert_many(transaction, batch)
        ended = row["status"] != "running"
        sessions.run_added(transaction, session_id, seq, row["createdAt"])
        head = run_id if row["hasTranscript"] else None
        sessions.run_ended(transaction, session_id, len(batch) if ended else 0, row["costUsd"] or 0.0, head)
        for one in approvals_of_run:
            approvals.insert(transaction, {**APPROVAL, "runId": run_id, "sessionId": session_id, **one})
        for subpath, lines in (entries or {}).items():
            own = row["sdkSessionId"]
            transcript = transcripts.insert(transaction, TranscriptKey(own, "-srv-project", subpath), 17)
            parts = [Entry(line.get("uuid"), to_json_text(line)) for line in lines]
            transcripts.insert_at(transaction, transcript, own, 0, parts)
    return run_id


def transcript_lines(session_id: str, *texts: str) -> list[dict[str, Any]]:
    """Return transcript entries as Claude Code writes them: each names its session."""
    return [{"uuid": uuid_of(3000 + n), "sessionId": session_id, "text": text} for n, text in enumerate(texts)]


def fill(database: Database) -> None:
    """Store two trees: a session with two runs and a fork of the first run, and another session."""
    add_session(database, ROOT, firstRunAt=at(1), title="Docs", metadataJson=to_json_text({"ticket": 17, "odd": "\0"}))
    first = add_run(
        database,
        ROOT,
        1,
        [{"type": "system"}, ODD, {"odd": "no type"}, {"type": "result"}],
        transcript={
            "": transcript_lines(uuid_of(2001), "one", "the shared text", SECRET),
            "subagents/agent-a1": transcript_lines(uuid_of(2001), "from a subagent"),
        },
        idempotencyKey="key-1",
        requestDigest="d" * 32,
        approvals_of_run=[{"id": uuid_of(4001)}, {"id": uuid_of(4002), **DENIAL}],
    )
    add_session(database, OTHER, firstRunAt=at(2), cwd="/srv/other")
    add_run(
        database,
        OTHER,
        2,
        [{"type": "result"}],
        cwd="/srv/other",
        transcript={"": transcript_lines(uuid_of(2002), "x")},
    )
    add_run(
        database,
        ROOT,
        3,
        [{"type": "assistant", "text": f"Here it is: {SECRET}"}],
        mode="resume",
        parentRunId=first,
        transcript={"": transcript_lines(uuid_of(2003), "one", "the shared text", "three")},
    )
    add_session(database, FORK, firstRunAt=at(4), parentSessionId=ROOT, forkedFromRunId=first)
    add_run(
        database,
        FORK,
        4,
        [{"type": "result", "n": n, "pad": SECRET * 10} for n in range(700)],
        mode="fork",
        parentRunId=first,
        parentSessionId=ROOT,
        forkAtMessage=uuid_of(9),
        forkAtIndex=2,
        status="error",
        errorCode="MAX_TURNS_REACHED",
        errorMessage="Too many.",
    )


# ---- the original service

BUN_SCHEMA = """
CREATE TABLE ccr_runs (
    id TEXT PRIMARY KEY, cwd TEXT NOT NULL, session_id TEXT, parent_session_id TEXT, mode TEXT NOT NULL,
    status TEXT NOT NULL, prompt TEXT, result_type TEXT, result_json TEXT, duration_ms INTEGER, created_at TEXT);
CREATE TABLE ccr_run_messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT, run_id TEXT NOT NULL REFERENCES ccr_runs (id), "index" INTEGER NOT NULL,
    message_type TEXT, message_json TEXT NOT NULL, created_at TEXT);
"""


def make_bun(path: Path, schema: str = BUN_SCHEMA) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(schema)


def add_bun_run(path: Path, run_id: Any, session_id: str | None, parent: str | None = None, **columns: Any) -> None:
    """Store a run of the original service; `sent` are the texts of its messages."""
    sent = columns.pop("sent", [json.dumps({"type": "assistant", "text": f"I am {run_id}."})])
    row = {
        "id": run_id,
        "cwd": "/srv/project",
        "session_id": session_id,
        "parent_session_id": parent,
        "mode": "resume" if parent else "start",
        "status": "completed",
        "prompt": f"Prompt of {run_id}",
        "result_type": "success",
        "result_json": json.dumps({"type": "result", "subtype": "success"}),
        "duration_ms": 1500,
        "created_at": "2025-06-01T10:00:00.000Z",
        **columns,
    }
    with closing(sqlite3.connect(path)) as connection, connection:
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO ccr_runs ({names}) VALUES ({marks})", list(row.values()))
        for index, text in enumerate(sent):
            connection.execute(
                'INSERT INTO ccr_run_messages (run_id, "index", message_type, message_json, created_at) '
                "VALUES (?, ?, ?, ?, ?)",
                [run_id, index, "assistant", text, row["created_at"]],
            )
