"""Every query of ours uses an index: the planner is asked, on both databases."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ccm.db import approvals, archive, deliveries, events, messages, runs, sessions, transcripts, trees
from ccm.db.driver.database import Database, Transaction
from ccm.models import Run, timestamp

RUN = Run(
    id="r",
    seq=1,
    session_id="s",
    sdk_session_id="s",
    parent_run_id=None,
    parent_session_id=None,
    mode="fresh",
    status="running",
    cwd="/",
    prompt="",
    options_json="{}",
    image_count=1,
    timeout_ms=86_400_000,
    approvals=1,
    approval_timeout_ms=1_000,
    webhook_url=None,
    fork_at_message=None,
    fork_at_index=None,
    result_type=None,
    result_json=None,
    error_code=None,
    error_message=None,
    cost_usd=None,
    message_count=0,
    duration_ms=None,
    queue_position=None,
    pending_approvals=0,
    has_transcript=0,
    transcript_stored=0,
    created_by=None,
    created_at="",
    started_at=None,
    ended_at=None,
)
APPROVAL: dict[str, Any] = {"id": "a", "runId": "r", "sessionId": "s", "toolName": "Bash", "inputJson": "{}"}
APPROVAL |= {"suggestionsJson": "[]", "status": "pending", "remember": 0, "interrupt": 0}
APPROVAL |= {"createdAt": "", "expiresAt": ""}
BOTH = {"sessionId": "s", "status": "pending"}
KEY = transcripts.TranscriptKey("s", "p")
FILTERS: list[dict[str, str]] = [
    {},
    {"status": "running"},
    {"sessionId": "s"},
    {"cwd": "/"},
    {"mode": "fresh"},
    {"status": "error", "cwd": "/", "mode": "fresh"},
]
QUERIES: dict[str, Callable[[Transaction], object]] = {
    "run": lambda t: runs.find(t, "r"),
    "run by key": lambda t: runs.find_by_idempotency_key(t, "k"),
    "run by SDK session": lambda t: runs.find_by_sdk_session(t, "s"),
    **{
        f"runs {filters} {after} {oldest}": lambda t, f=filters, a=after, o=oldest: runs.page(  # type: ignore[misc]
            t, f, limit=10, after=a, oldest_first=o
        )
        for filters in FILTERS
        for after in (None, 5)
        for oldest in (False, True)
    },
    "next seq": runs.next_seq,
    "links": lambda t: runs.links(t, "s"),
    "running": lambda t: runs.running(t, "s"),
    "queue": lambda t: runs.queue(t, "me"),
    "waiting": runs.count_waiting,
    "started": lambda t: runs.started(t, "me"),
    "started elsewhere": lambda t: runs.started_elsewhere(t, "me"),
    "end alone": lambda t: runs.end_alone(t, "r", "EXECUTION_ERROR", "x"),
    "images": lambda t: runs.images_json(t, "r"),
    "start": lambda t: runs.start(t, RUN, None, "me"),
    "end": lambda t: runs.end(t, RUN, {"status": "completed"}),
    "transcript": lambda t: transcripts.append(t, KEY, [transcripts.Entry("u", "{}"), transcripts.Entry(None, "{}")]),
    "transcript entries": lambda t: transcripts.texts(t, KEY, 5, 10),
    "transcript sizes": lambda t: transcripts.sizes(t, KEY, -1, 10),
    "transcript update": lambda t: (transcripts.insert(t, KEY, 17), transcripts.updated_at_ms(t, KEY)),
    "transcripts of a session": lambda t: transcripts.of_session(t, "s"),
    "transcripts of a project": lambda t: transcripts.of_project(t, "p"),
    "no transcript any more": lambda t: transcripts.delete(t, KEY),
    "session": lambda t: sessions.find(t, "s"),
    **{
        f"sessions {filters} {after}": lambda t, f=filters, a=after: sessions.page(t, f, limit=10, after=a)  # type: ignore[misc]
        for filters in ({}, {"cwd": "/"}, {"parentSessionId": "s"})
        for after in (None, 5)
    },
    "run added": lambda t: sessions.run_added(t, "s", 1, ""),
    "run ended": lambda t: sessions.run_ended(t, "s", 1, 0.5, None),
    "describe": lambda t: sessions.update(t, "s", {"title": "x"}),
    "last index": lambda t: messages.last_index(t, "r"),
    "indexes": lambda t: messages.indexes(t, "r", -1, 10, types=[], limit=10),
    "indexes of types": lambda t: messages.indexes(t, "r", -1, 10, types=["a", "b"], limit=10),
    "sizes": lambda t: messages.sizes(t, "r", -1, 10, 10),
    "texts": lambda t: messages.texts(t, "r", -1, 10),
    "texts before": lambda t: messages.texts_before(t, "r", 10, "a", 5),
    "first running": lambda t: runs.first_running(t, "s"),
    "sessions beyond": lambda t: archive.sessions_beyond(t, 0, 10),
    "dated texts": lambda t: archive.dated_texts(t, "r", -1, 10),
    "ends of all": lambda t: (archive.first_seq(t), archive.last_seq(t)),
    "end of a session": lambda t: archive.last_seq_of_session(t, "s"),
    "gone on": lambda t: archive.has_gone_on(t, "s", "r"),
    "run at": lambda t: archive.run_at(t, 1),
    "event": lambda t: events.insert(t, "run.started", RUN),
    "last event": events.last_id,
    "sizes of events": lambda t: events.sizes(t, 0, 10),
    "events": lambda t: events.read(t, 0, 10),
    "text of an event": lambda t: events.text(t, 1),
    "delivery to be": lambda t: deliveries.insert(t, "r", "service", "evt_2", "h:80", reason=None, now=timestamp()),
    "delivery": lambda t: deliveries.find(t, 1),
    "deliveries": lambda t: deliveries.page(t, "r", limit=10, after=None),
    "disabled": lambda t: deliveries.disabled(t, "r", "run"),
    **{
        f"due {again} {without}": lambda t, a=again, w=without: deliveries.due(  # type: ignore[misc]
            t, timestamp(), again=a, without=w, limit=10
        )
        for again in (False, True)
        for without in ((), ("a:80", "b:80"))
    },
    "next due": lambda t: deliveries.next_due(t, timestamp()),
    "bring back": lambda t: deliveries.bring_back(t, timestamp(), timestamp()),
    "tried": lambda t: deliveries.tried(t, 1, "[]", status="failed", reason="x", next_attempt_at=None),
    "go on": lambda t: deliveries.go_on(t, "r", "run", timestamp()),
    "disable a run": lambda t: deliveries.disable_run(t, "r", "run", "gone"),
    "disable the service": lambda t: deliveries.disable_service(t, "gone"),
    "approval": lambda t: approvals.find(t, "a"),
    **{
        f"approvals {filters} {after}": lambda t, f=filters, a=after: approvals.page(t, f, limit=10, after=a)  # type: ignore[misc]
        for filters in ({}, {"runId": "r"}, {"sessionId": "s"}, {"status": "pending"}, {"status": "denied"}, BOTH)
        for after in (None, 5)
    },
    "pending approvals": lambda t: approvals.pending(t, "r"),
    "approvals for who comes back": lambda t: approvals.pending_or_resolved_since(t, "r", 5),
    "runs that wait for answers": lambda t: approvals.count_other_waiting_runs(t, "r"),
    "new approval": lambda t: approvals.insert(t, APPROVAL),
    "answer": lambda t: approvals.resolve(t, "a", {"status": "denied", "message": "x"}),
    "last event of a run": lambda t: approvals.last_event(t, "r"),
    "approvals' changes": lambda t: approvals.changes(t, "r", 5),
    "roots": lambda t: trees.roots(t, 0, 10),
    "holding": lambda t: messages.holding(t, "r", "x"),
}


@pytest.fixture
def filled(writable: Database) -> Database:
    with writable.transaction() as transaction:
        now = timestamp()
        sessions.insert(
            transaction,
            {"id": "s", "cwd": "/", "metadataJson": "{}", "firstRunAt": now, "lastRunAt": now, "lastRunSeq": 1},
        )
        row = {"id": "r", "seq": 1, "cwd": "/", "sessionId": "s", "sdkSessionId": "s", "mode": "fresh"}
        row |= {"status": "running", "prompt": "", "optionsJson": "{}", "imageCount": 1, "createdAt": now}
        runs.insert(transaction, row, "[]")
        events.insert(transaction, "run.created", RUN)
        deliveries.insert(transaction, "r", "run", "evt_1", "h:80", reason=None, now=now)
    return writable


@contextmanager
def explained(transaction: Transaction, is_sqlite: bool) -> Iterator[list[str]]:
    """The plans of all statements within."""
    plans: list[str] = []
    execute = transaction._execute

    def explain(sql: str, parameters: Any) -> None:
        execute(("EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN ") + sql, parameters)
        plans.append("\n".join(str(row[-1]) for row in transaction._cursor.fetchall()))
        execute(sql, parameters)

    transaction._execute = explain  # type: ignore[method-assign]
    yield plans


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_uses_an_index(filled: Database, name: str) -> None:
    with filled.transaction() as transaction:
        if not filled.is_sqlite:
            # The tables are so small that a scan would be cheapest; forbidden, it is taken only for want of an index.
            transaction.execute("SET LOCAL enable_seqscan = off")
            transaction.execute("SET LOCAL enable_sort = off")
            transaction.execute("SET LOCAL enable_bitmapscan = off")
        with explained(transaction, filled.is_sqlite) as plans:
            QUERIES[name](transaction)

    assert plans
    for plan in plans:
        if filled.is_sqlite:
            assert not re.search(r"SCAN (?!CONSTANT)(?!.*USING)", plan), plan
            assert "TEMP B-TREE" not in plan, plan
        else:
            assert "Seq Scan" not in plan, plan
            assert not re.search(r"^\s*(->\s*)?Sort ", plan, re.M), plan
