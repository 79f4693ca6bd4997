"""Streams report silence. They end with their reader, or with the service once everything stored has been sent."""

from __future__ import annotations

import itertools
import json
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest

from ccm.core.queries import Queries
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.shared_reads import Part, Place, SharedReads
from ccm.core.streams import Messages, Stream, StreamItem
from ccm.db import messages, runs, sessions
from ccm.db.driver.database import Database
from ccm.errors import StorageDown
from ccm.models import Message, Run

NOW = "2026-11-22T09:40:11.310Z"


class Storage:
    """Stores rows as the writer would, and notifies."""

    def __init__(self, writable: Database, notifier: Notifier) -> None:
        self._writable = writable
        self.notifier = notifier
        self.shared = SharedReads(notifier)
        self._seq = 0

    def run(self) -> str:
        """Store another running run of session S."""
        self._seq += 1
        run_id = f"run-{self._seq}"
        with self._writable.transaction() as transaction:
            if self._seq == 1:
                row = {"id": "S", "cwd": "/", "metadataJson": "{}", "firstRunAt": NOW, "lastRunAt": NOW}
                sessions.insert(transaction, {**row, "lastRunSeq": 1})
            row = {"id": run_id, "sessionId": "S", "sdkSessionId": run_id, "mode": "fresh", "status": "running"}
            more = {"cwd": "/", "prompt": "p", "optionsJson": "{}", "imageCount": 0, "createdAt": NOW}
            runs.insert(transaction, {**row, **more, "seq": self._seq, "startedAt": NOW}, None)
        self.notifier.notify([run_id, "S"])
        return run_id

    def say(self, run_id: str, *indexes: int, size: int = 0) -> None:
        with self._writable.transaction() as transaction:
            rows = [Message(run_id, "S", index, "a", json.dumps([index, "x" * size]), NOW) for index in indexes]
            messages.insert_many(transaction, rows)
        self.notifier.notify([run_id, "S"])

    def end(self, run_id: str) -> None:
        with self._writable.transaction() as transaction:
            run = runs.find(transaction, run_id)
            assert run is not None
            runs.end(transaction, run, {"status": "completed", "messageCount": run.message_count})
        self.notifier.notify([run_id, "S"])


@pytest.fixture
def notifier() -> Notifier:
    return Notifier()


@pytest.fixture
def storage(writable: Database, notifier: Notifier) -> Storage:
    return Storage(writable, notifier)


@pytest.fixture
def queries(storage: Storage, reader: Database) -> Queries:
    return Queries(reader)


def shown(event: StreamItem) -> object:
    """Return the indexes of messages, the id of an ended run, or None for silence."""
    if isinstance(event, Messages):
        assert [json.loads(text)[0] for _, text in event.numbered] == [index for index, _ in event.numbered]
        return [index for index, _ in event.numbered]
    return event.id if isinstance(event, Run) else None


def rest(events: Iterator[StreamItem]) -> list[object]:
    """Return the events until the stream ends, without silence; fail if it does not end."""
    shown_events = [shown(event) for event in itertools.islice(events, 20)]
    assert len(shown_events) < 20, "the stream does not end"
    return [event for event in shown_events if event is not None]


def never() -> bool:
    return False


def after(seconds: float, action: Callable[[], None]) -> None:
    threading.Timer(seconds, action).start()


def test_silence_is_reported_until_a_message_arrives(queries: Queries, storage: Storage) -> None:
    run_id = storage.run()
    events = map(shown, Stream(queries, storage.shared, never, silence=0.01).run(run_id, -1))

    assert [next(events) for _ in range(3)] == [None] * 3
    storage.say(run_id, 0, 1)
    assert next(event for event in events if event is not None) == [0, 1]
    storage.end(run_id)
    assert next(event for event in events if event is not None) == run_id
    assert list(events) == []


def test_a_notification_delivers_new_messages_at_once(queries: Queries, storage: Storage) -> None:
    run_id = storage.run()
    events = map(shown, Stream(queries, storage.shared, never, silence=60).run(run_id, -1))
    after(0.05, lambda: storage.say(run_id, 0))
    assert next(events) == [0]
    after(0.05, lambda: storage.end(run_id))
    assert next(events) == run_id


def test_a_long_run_arrives_in_batches(queries: Queries, storage: Storage) -> None:
    run_id = storage.run()
    storage.say(run_id, *range(20), size=100_000)
    storage.say(run_id, 20, size=1_000_000)
    storage.end(run_id)
    batches = list(map(shown, Stream(queries, storage.shared, never).run(run_id, 4)))

    assert batches[-1] == run_id
    assert [index for batch in batches[:-1] for index in batch] == list(range(5, 21))  # type: ignore[attr-defined]
    assert len(batches) > 8


def test_a_stream_ends_when_its_reader_disconnects(queries: Queries, storage: Storage, notifier: Notifier) -> None:
    run_id = storage.run()
    assert rest(Stream(queries, storage.shared, lambda: True, silence=0.01).run(run_id, -1)) == []
    assert rest(Stream(queries, storage.shared, lambda: True, silence=0.01).session("S", 0, -1)) == []
    assert notifier._subscribers == {}


def test_a_stream_that_is_closed_early_leaves_nothing_behind(queries: Queries, storage: Storage) -> None:
    run_id = storage.run()
    events: Iterator[StreamItem] = Stream(queries, storage.shared, never, silence=0.01).run(run_id, -1)
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert storage.notifier._subscribers == {}


def test_everything_stored_is_sent_before_the_service_stops(
    queries: Queries, storage: Storage, notifier: Notifier
) -> None:
    first, second, third = storage.run(), storage.run(), storage.run()
    storage.say(first, 0)
    storage.end(first)

    def stop() -> None:
        storage.say(second, 0, 1)
        storage.end(second)
        notifier.close()

    session = Stream(queries, storage.shared, never, silence=60).session("S", 0, -1)
    assert [shown(next(session)), shown(next(session))] == [[0], first]
    after(0.05, stop)
    assert rest(session) == [[0, 1], second]
    assert rest(Stream(queries, storage.shared, never, silence=60).run(third, -1)) == []


def test_a_session_stream_includes_future_runs(queries: Queries, storage: Storage) -> None:
    first = storage.run()
    storage.end(first)
    events = map(shown, Stream(queries, storage.shared, never, silence=60).session("S", 0, -1))
    assert next(events) == first

    def go_on() -> None:
        storage.say(storage.run(), 0)

    after(0.05, go_on)
    assert next(events) == [0]


def test_a_stream_outlasts_a_database_that_is_down(
    queries: Queries, storage: Storage, reader: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = storage.run()
    storage.say(run_id, 0)
    events = map(shown, Stream(queries, storage.shared, never).run(run_id, -1))
    transaction = reader.transaction

    def away(uncertain: bool = False) -> object:
        raise StorageDown("away")

    monkeypatch.setattr("ccm.core.streams.POLL_INTERVAL", 0.01)
    monkeypatch.setattr(reader, "transaction", away)
    assert [next(events), next(events)] == [None, None]
    monkeypatch.setattr(reader, "transaction", transaction)
    assert next(events) == [0]


def test_the_end_of_a_run_is_sent_although_its_messages_are_gone(
    storage: Storage, queries: Queries, writable: Database
) -> None:
    run_id = storage.run()
    storage.say(run_id, 0, 1, 2)
    storage.end(run_id)
    with writable.transaction() as transaction:
        transaction.execute("DELETE FROM ccr_run_messages")

    assert [shown(event) for event in Stream(queries, storage.shared, never).run(run_id, -1)] == [run_id]


def test_streams_at_the_same_place_get_the_same_messages(
    queries: Queries, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = storage.run()
    storage.say(run_id, 0, 1)
    reads: list[Place] = []
    next_part = queries.next_part

    def count(run_id: str, place: Place) -> Part | None:
        reads.append(place)
        return next_part(run_id, place)

    monkeypatch.setattr(queries, "next_part", count)
    whole: list[Iterator[StreamItem]] = [Stream(queries, storage.shared, never).run(run_id, -1) for _ in range(10)]
    whole.append(Stream(queries, storage.shared, never).session("S", 0, -1))
    first = [next(stream) for stream in whole]
    assert shown(first[0]) == [0, 1]
    rendered = {id(messages.rendered) for messages in first if isinstance(messages, Messages)}
    assert len(rendered) == 1, "the messages are rendered again for each stream"
    assert reads == [(-1,)]

    part = Stream(queries, storage.shared, never).run(run_id, 0)
    assert shown(next(part)) == [1]
    storage.say(run_id, 2)
    storage.end(run_id)
    assert [shown(next(stream)) for stream in [part, *whole]] == [[2]] * 12
    assert [shown(next(stream)) for stream in [part, *whole]] == [run_id] * 12
    assert reads == [(-1,), (1,), (2,)]


def test_a_waiting_stream_holds_no_messages(
    queries: Queries, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.storage.shared_reads.POLL_INTERVAL", 0.01)
    run_id = storage.run()
    storage.say(run_id, 0)
    events = Stream(queries, storage.shared, never, silence=0.1).run(run_id, -1)
    messages = next(events)
    assert isinstance(messages, Messages)
    reference = weakref.ref(messages)
    del messages
    assert any(next(events) is None and reference() is None for _ in range(50))
