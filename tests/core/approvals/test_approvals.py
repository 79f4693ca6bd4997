"""Permission requests, answers and their events, with storage that fails."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import psycopg
import pytest
from claude_agent_sdk import ToolPermissionContext

from ccm.core.approvals.requests import Approvals
from ccm.core.approvals.transitions import ApprovalTransitions
from ccm.core.runs.end_store import no_transcript
from ccm.core.runs.transitions import RunTransitions
from ccm.core.storage.notifier import APPROVALS, EVENTS, Notifier
from ccm.core.storage.writer import Writer
from ccm.core.webhooks.outbox import Outbox
from ccm.db import events as feed
from ccm.db import runs, sessions
from ccm.db.driver.database import Database
from ccm.db.driver.migrate import migrate
from ccm.errors import ApprovalResolved, NotFound
from ccm.models import Answer, Question
from ccm.timestamps import timestamp
from tests.waiting import until

SOON = 60.0
QUESTION = Question("Bash", "toolu_1", {"command": "make"})


class Desk:
    """A run that sends permission requests, in an event loop of its own."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.notifier = Notifier()
        self.writer = Writer(database, self.notifier, 2**20, lambda _run, _error: None)
        transitions = ApprovalTransitions(Outbox(service=False), 8)
        self.approvals = Approvals(self.writer, self.notifier, transitions, timeout=60)
        with database.transaction() as transaction:
            now = timestamp()
            session = {"id": "s", "cwd": "/", "metadataJson": "{}", "firstRunAt": now, "lastRunAt": now}
            sessions.insert(transaction, session | {"lastRunSeq": 1})
            row = {"id": "r", "seq": 1, "cwd": "/", "sessionId": "s", "sdkSessionId": "s", "mode": "fresh"}
            row |= {"status": "running", "prompt": "", "optionsJson": "{}", "imageCount": 0, "createdAt": now}
            runs.insert(transaction, row | {"approvals": 1}, None)
            self.run = runs.get(transaction, "r")
        self.ticks = 0
        self._withdraw = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self.writer.start()

    def ask(self) -> Future[Answer]:
        return self._pool.submit(lambda: asyncio.run(self._ask()))

    async def _ask(self) -> Answer:
        asking = asyncio.create_task(self.approvals.ask(self.run, QUESTION))
        while not asking.done():
            await asyncio.sleep(0.01)
            self.ticks += 1
            if self._withdraw.is_set():
                asking.cancel()
        return await asking

    def withdraw(self) -> None:
        self._withdraw.set()

    def close(self) -> None:
        self.withdraw()  # otherwise a failed test would wait for its answer for ever
        self.writer.stop(time.monotonic() + SOON)
        self._pool.shutdown()


@pytest.fixture
def desk(writable: Database) -> Iterator[Desk]:
    desk = Desk(writable)
    yield desk
    desk.close()


def stored(reader: Database) -> list[tuple[str, str]]:
    return [(row["id"], row["status"]) for row in reader.rows("SELECT id, status FROM ccr_approvals ORDER BY seq")]


def events(reader: Database) -> list[tuple[str, str, int]]:
    """Return each event's type, with the approval's status and the run's number of pending approvals."""
    with reader.transaction() as transaction:
        stored_events = [json.loads(event.json) for event in feed.read(transaction, 0, feed.last_id(transaction))]
    return [
        (event["type"], event["data"]["approval"]["status"], event["data"]["run"]["pendingApprovals"])
        for event in stored_events
    ]


def test_each_event_has_the_state_at_its_time(desk: Desk, reader: Database) -> None:
    with desk.notifier.subscribe(APPROVALS) as requested:
        waiting = desk.ask()
        assert requested.wait(SOON)
    ((approval_id, status),) = stored(reader)
    assert [status, events(reader)] == ["pending", [("approval.requested", "pending", 1)]]

    with ExitStack() as stack:
        subscriptions = [stack.enter_context(desk.notifier.subscribe(key)) for key in ("r", "s", EVENTS, APPROVALS)]
        desk.approvals.answer(approval_id, Answer(allow=True), "alice")
        assert all(subscription.wait(SOON) for subscription in subscriptions)
    assert waiting.result(SOON) == Answer(allow=True)
    assert events(reader)[1:] == [("approval.resolved", "allowed", 0)]


def test_claude_code_gets_the_first_answer(desk: Desk, reader: Database) -> None:
    waiting = desk.ask()
    ((approval_id, _),) = until(lambda: stored(reader))
    first = Answer(allow=False, message="No.", interrupt=True)
    desk.approvals.answer(approval_id, first, None)

    with pytest.raises(ApprovalResolved) as refused:
        desk.approvals.answer(approval_id, Answer(allow=True), None)
    assert refused.value.approval["message"] == "No."
    assert waiting.result(SOON) == first
    assert desk.approvals._waiters == {}


def test_a_withdrawn_request_expires(desk: Desk, reader: Database) -> None:
    waiting = desk.ask()
    until(lambda: stored(reader))
    desk.withdraw()

    with pytest.raises(asyncio.CancelledError):
        waiting.result(SOON)
    until(lambda: [status for _, status in stored(reader)] == ["expired"])
    assert events(reader)[-1] == ("approval.resolved", "expired", 0)
    assert desk.approvals._waiters == {}


def test_the_end_of_a_run_expires_its_requests(desk: Desk, reader: Database) -> None:
    desk.ask()
    until(lambda: stored(reader))
    approvals = ApprovalTransitions(Outbox(service=False), 8)
    transitions = RunTransitions(workers=8, queue_limit=8, outbox=Outbox(service=False), approvals=approvals)
    # As after a kill of the service: no thread of the run is left to withdraw its requests.
    desk.writer.write(lambda transaction: transitions.recover(transaction, "r", no_transcript))

    assert [status for _, status in stored(reader)] == ["expired"]


def test_a_request_that_cannot_be_stored_is_denied_and_logged(
    desk: Desk, reader: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with desk.database.transaction() as transaction:
        transaction.execute("UPDATE ccr_runs SET status = 'error'")
    answer = desk.ask().result(SOON)

    assert answer.allow is False
    assert "could not store the request" in str(answer.message)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert [stored(reader), events(reader)] == [[], []]


def test_a_request_after_the_writer_has_stopped_is_denied(desk: Desk) -> None:
    desk.writer.stop(time.monotonic() + SOON)
    assert desk.ask().result(SOON).allow is False


def test_every_field_of_the_sdks_permission_request_is_stored() -> None:
    sent = {field.name for field in dataclasses.fields(ToolPermissionContext)} - {"signal"}
    assert sent | {"tool_name", "input"} == {field.name for field in dataclasses.fields(Question)}


def test_an_answer_to_an_unknown_approval_is_refused(desk: Desk) -> None:
    with pytest.raises(NotFound, match="There is no approval x"):
        desk.approvals.answer("x", Answer(allow=True), None)


@pytest.mark.parametrize("withdrawn", [False, True])
def test_a_request_waits_while_the_database_is_locked(tmp_path: Path, withdrawn: bool) -> None:
    url = f"sqlite:///{tmp_path}/db.sqlite"
    with ExitStack() as stack:
        database = stack.enter_context(closing(Database(url, writable=True, pool_size=1)))
        reader = stack.enter_context(closing(Database(url)))
        migrate(database)
        desk = stack.enter_context(closing(Desk(database)))
        with closing(sqlite3.connect(tmp_path / "db.sqlite", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = desk.ask()
            until(lambda: desk.writer.last_error)
            before = desk.ticks
            until(lambda: desk.ticks > before + 5)  # its loop keeps running
            if withdrawn:
                desk.withdraw()
                with pytest.raises(asyncio.CancelledError):
                    waiting.result(SOON)
            assert stored(reader) == []
        if withdrawn:
            desk.writer.submit(lambda _: None).future.result(SOON)
            assert [status for _, status in stored(reader)] == ["expired"]
        else:
            ((approval_id, _),) = until(lambda: stored(reader))
            desk.approvals.answer(approval_id, Answer(allow=True), None)
            assert waiting.result(SOON) == Answer(allow=True)


def test_after_an_uncertain_commit_a_request_is_stored_once_and_the_first_answer_counts(postgresql: str) -> None:
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as admin:
        admin.execute("CREATE DATABASE uncertain_approvals")
    url = f"{postgresql}/uncertain_approvals"
    with ExitStack() as stack:
        database = stack.enter_context(closing(Database(url, writable=True, pool_size=1)))
        reader = stack.enter_context(closing(Database(url)))
        migrate(database)
        desk = stack.enter_context(closing(Desk(database)))
        original = database._pool.commit
        lost: list[int] = []

        def commit_and_lose_the_answer() -> None:
            original()
            if len(lost) % 2 == 0:
                lost.append(1)
                raise psycopg.OperationalError("the connection was lost in COMMIT")
            lost.append(0)

        database._pool.commit = commit_and_lose_the_answer  # type: ignore[method-assign]
        waiting = desk.ask()
        ((approval_id, _),) = until(lambda: stored(reader))
        answer = Answer(allow=True, updated_input={"command": "true"})
        assert desk.approvals.answer(approval_id, answer, "alice").decided_by == "alice"
        with pytest.raises(ApprovalResolved):
            desk.approvals.answer(approval_id, answer, "bob")

        assert waiting.result(SOON) == answer
        assert sum(lost) >= 2
        assert [status for _, status in stored(reader)] == ["allowed"]
        assert [kind for kind, _, _ in events(reader)] == ["approval.requested", "approval.resolved"]
