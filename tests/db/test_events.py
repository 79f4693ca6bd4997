"""The ids of events are never reused, not even after the newest event has been deleted."""

from __future__ import annotations

from ccm.db import events, runs, sessions
from ccm.db.driver.database import Database
from ccm.models import Run
from ccm.timestamps import timestamp


def a_run(writable: Database) -> Run:
    now = timestamp()
    row = {"id": "r", "seq": 1, "cwd": "/", "sessionId": "s", "sdkSessionId": "s", "mode": "fresh", "status": "running"}
    row |= {"prompt": "p", "optionsJson": "{}", "imageCount": 0, "createdAt": now}
    session = {"id": "s", "cwd": "/", "metadataJson": "{}", "firstRunAt": now, "lastRunAt": now, "lastRunSeq": 1}
    with writable.transaction() as transaction:
        sessions.insert(transaction, session)
        runs.insert(transaction, row, None)
        run = runs.find(transaction, "r")
    assert run is not None
    return run


def test_the_last_id_is_known_after_its_event_was_deleted(writable: Database) -> None:
    run = a_run(writable)
    with writable.transaction() as transaction:
        assert [events.last_id(transaction), events.last_given(transaction)] == [0, 0]
        for _ in range(3):
            events.insert(transaction, "run.created", run)
    with writable.transaction() as transaction:
        assert [events.last_id(transaction), events.last_given(transaction)] == [3, 3]
        transaction.execute("DELETE FROM ccr_events")
    with writable.transaction() as transaction:
        assert [events.last_id(transaction), events.last_given(transaction)] == [0, 3]
        events.insert(transaction, "run.created", run)
        assert events.last_id(transaction) == 4
