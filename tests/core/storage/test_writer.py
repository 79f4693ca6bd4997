"""The writer on real databases, including their faults."""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from ccm.core.storage.notifier import Notifier
from ccm.core.storage.write_task import WriteTask
from ccm.core.storage.writer import Writer
from ccm.db import messages, runs, search, sessions
from ccm.db.driver.database import Database
from ccm.db.driver.migrate import migrate
from ccm.db.driver.transaction import Transaction
from ccm.errors import NotFound, StorageDown, StorageRejected, Unavailable
from ccm.models import Message
from ccm.timestamps import timestamp
from tests.disks import SmallDisk
from tests.postgresql import PostgreSQLServer
from tests.storage_faults import content, cut_off, damaged, impatient, locked, path_of
from tests.waiting import until

SOON = 60.0


class Harness:
    """A writer, and two stored runs `a` and `b`."""

    def __init__(self, database: Database, budget: int = 2**20, *, filled: bool = False) -> None:
        self.refused: list[tuple[str, str]] = []
        self.notifier = Notifier()
        self.database = database
        if not filled:
            self._fill()
        self.writer = Writer(database, self.notifier, budget, lambda run, error: self.refused.append((run, str(error))))

    def _fill(self) -> None:
        with self.database.transaction() as transaction:
            for seq, name in enumerate("ab", start=1):
                now = timestamp()
                session = {"id": name, "cwd": "/", "metadataJson": "{}", "firstRunAt": now, "lastRunAt": now}
                sessions.insert(transaction, session | {"lastRunSeq": seq})
                row = {"id": name, "seq": seq, "cwd": "/", "sessionId": name, "sdkSessionId": name, "mode": "fresh"}
                row |= {"status": "running", "prompt": "", "optionsJson": "{}", "imageCount": 0, "createdAt": now}
                runs.insert(transaction, row, None)

    def __enter__(self) -> Harness:
        self.writer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.stop(time.monotonic() + SOON)

    def append(self, run_id: str, *indexes: int, text: str = "{}") -> None:
        async def put() -> None:
            for index in indexes:
                await self.writer.append(Message(run_id, run_id, index, "assistant", text, timestamp()))

        asyncio.run(put())

    def settle(self) -> None:
        """Wait until everything queued so far is committed."""
        self.writer.submit(lambda _: None).future.result(SOON)


@pytest.fixture
def harness(writable: Database) -> Iterator[Harness]:
    with Harness(writable) as harness:
        yield harness


def indexes(reader: Database, run_id: str) -> list[int]:
    with reader.transaction() as transaction:
        return messages.indexes(transaction, run_id, -1, 10**9, types=[], limit=10**6)


def lock(path: Path) -> sqlite3.Connection:
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    return other


# ---- without faults


def test_messages_are_stored_in_order_then_notified(harness: Harness, reader: Database) -> None:
    with harness.notifier.subscribe("a") as notified:
        harness.append("a", *range(500))
        assert notified.wait(SOON)
    harness.settle()

    assert indexes(reader, "a") == list(range(500))


def test_a_notification_means_committed(harness: Harness, reader: Database) -> None:
    for index in range(50):
        with harness.notifier.subscribe("a") as notified:
            harness.append("a", index)
            assert notified.wait(SOON)
        assert indexes(reader, "a") == list(range(index + 1))


def test_a_write_returns_its_result_after_the_commit(harness: Harness, reader: Database) -> None:
    followed: list[tuple[str, int]] = []

    def work(transaction: Transaction) -> str:
        transaction.execute("UPDATE ccr_runs SET prompt = 'written' WHERE id = 'a'")
        return "done"

    def follow(result: str) -> None:
        followed.append((result, len(reader.rows("SELECT id FROM ccr_runs WHERE prompt = 'written'"))))

    assert harness.writer.write(work, follow) == "done"
    assert followed == [("done", 1)]


def test_writes_and_messages_keep_their_order(harness: Harness) -> None:
    seen: list[int] = []

    def count(transaction: Transaction) -> None:
        seen.append(messages.last_index(transaction, "a") + 1)

    pending = []
    for index in range(100):
        harness.append("a", index)
        pending.append(harness.writer.submit(count))
    for write in pending:
        write.future.result(SOON)

    assert seen == list(range(1, 101))


def test_a_write_that_raises_rolls_back_alone(harness: Harness, reader: Database) -> None:
    def refuse(transaction: Transaction) -> None:
        transaction.execute("UPDATE ccr_runs SET prompt = 'half done' WHERE id = 'b'")
        raise NotFound("no such thing")

    harness.append("a", 0)
    with pytest.raises(NotFound):
        harness.writer.write(refuse)
    with pytest.raises(StorageRejected):
        harness.writer.write(lambda transaction: transaction.execute("INSERT INTO nowhere VALUES (1)"))
    harness.append("a", 1)
    harness.settle()

    assert indexes(reader, "a") == [0, 1]
    assert reader.rows("SELECT id FROM ccr_runs WHERE prompt = 'half done'") == []


def test_batches_form_under_load(harness: Harness, reader: Database) -> None:
    held = threading.Event()
    blocking = harness.writer.submit(lambda _: held.wait(SOON))
    commits: list[int] = []
    original = harness.database.transaction

    def counted(uncertain: bool = False) -> object:
        commits.append(1)
        return original(uncertain)

    until(lambda: blocking._in_progress)
    harness.database.transaction = counted  # type: ignore[method-assign, assignment]
    harness.append("a", *range(1000))
    held.set()
    harness.settle()

    assert indexes(reader, "a") == list(range(1000))
    assert len(commits) <= 2


# ---- back-pressure


@pytest.mark.parametrize(("json", "said"), [("x" * 1_000, None), ("x" * 400, "y" * 600)], ids=["", "with its text"])
def test_a_run_waits_for_the_budget_without_blocking_its_loop(tmp_path: Path, json: str, said: str | None) -> None:
    url = f"sqlite:///{tmp_path}/db.sqlite"
    database, reader = Database(url, writable=True, pool_size=1), Database(url)
    migrate(database)
    with Harness(database, budget=10_000) as harness:
        other = lock(tmp_path / "db.sqlite")

        async def run() -> tuple[int, int]:
            done = 0

            async def produce() -> None:
                nonlocal done
                for index in range(100):
                    await harness.writer.append(Message("a", "a", index, "assistant", json, timestamp(), said))
                    done += 1

            producer = asyncio.create_task(produce())
            while not (harness.writer._budget._waiters or producer.done()):
                await asyncio.sleep(0)
            before = done
            assert harness.writer._budget._charged <= 10_000
            for _ in range(100):  # the loop is alive while the run waits
                await asyncio.sleep(0)
            other.execute("ROLLBACK")
            await producer
            return before, done

        before, done = asyncio.run(run())
        harness.settle()
        assert (before, done) == (10, 100)
        assert indexes(reader, "a") == list(range(100))
        assert harness.writer._budget._charged == 0
        other.close()
    database.close()
    reader.close()


def test_a_message_larger_than_the_budget_is_stored(writable: Database, reader: Database) -> None:
    with Harness(writable, budget=100) as harness:
        harness.append("a", 0, 1, 2, text="x" * 1_000)
        harness.settle()
        assert indexes(reader, "a") == [0, 1, 2]


# ---- every method while storage is down: another program has locked the database, or it is out of reach


@contextmanager
def down(fault: str, harness: Harness) -> Iterator[None]:
    """Cause a fault that storage recovers from."""
    database = harness.database
    if fault == "locked":
        with locked(database.url):
            yield
    elif database.is_sqlite:
        path = path_of(database.url)
        path.rename(path.with_name("away"))
        yield
        path.with_name("away").rename(path)
    else:
        with cut_off(database):
            yield


@pytest.fixture
def stopped(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    """A writer that is not started, and soon gives up a write that is not in progress."""
    monkeypatch.setattr("ccm.core.storage.writer.WRITE_TIMEOUT", 0.1)
    monkeypatch.setattr("ccm.core.storage.writer.OUTCOME_TIMEOUT", SOON)
    database = Database(impatient(database_url, monkeypatch), writable=True, pool_size=1)
    migrate(database)
    yield Harness(database)
    database.close()


def prompt_of(harness: Harness, run_id: str) -> str:
    return str(next(row for row in content(harness.database.url)["ccr_runs"] if row[0] == run_id))


def rename(transaction: Transaction) -> str:
    transaction.execute("UPDATE ccr_runs SET prompt = 'renamed' WHERE id = 'a'")
    return "renamed"


Check = Callable[[], object]


def _append(harness: Harness) -> Check:
    harness.append("a", *range(100))
    until(lambda: harness.writer.last_error)

    def stored_once_and_in_order() -> bool:
        harness.settle()
        return [row[2] for row in sorted(content(harness.database.url)["ccr_run_messages"])] == list(range(100))

    return stored_once_and_in_order


def _submit(harness: Harness) -> Check:
    write = harness.writer.submit(rename)
    until(lambda: harness.writer.last_error)
    assert not write.future.done()
    return lambda: write.future.result(SOON) == "renamed" and "renamed" in prompt_of(harness, "a")


def _write(harness: Harness) -> Check:
    with pytest.raises(Unavailable) as refusal:
        harness.writer.write(rename)
    assert refusal.value.code == "STORAGE_UNAVAILABLE"
    assert str(refusal.value).startswith("Nothing was stored: ")

    def never_stored() -> bool:
        harness.settle()
        return "renamed" not in prompt_of(harness, "a")

    return never_stored


def _call_later(harness: Harness) -> Check:
    called: list[str] = []
    harness.writer.submit(rename)
    harness.writer.call_later(0.0, lambda: called.append(threading.current_thread().name))
    return lambda: until(lambda: called) == ["writer"]


def _start(harness: Harness) -> Check:
    write = harness.writer.submit(rename)
    harness.writer.start()  # a second time
    return lambda: write.future.result(SOON) == "renamed"


def _stop(harness: Harness) -> Check:
    harness.append("a", 0, 1)
    write = harness.writer.submit(rename)
    assert not harness.writer.stop(time.monotonic())
    with pytest.raises(Unavailable):
        write.future.result(SOON)

    def nothing_stored() -> bool:
        assert {run_id for run_id, _ in harness.refused} == {"a"}
        return not content(harness.database.url)["ccr_run_messages"] and "renamed" not in prompt_of(harness, "a")

    return nothing_stored


METHODS = {
    "append": _append,
    "submit": _submit,
    "write": _write,
    "call_later": _call_later,
    "start": _start,
    "stop": _stop,
}


def test_every_public_method_of_the_writer_is_tested() -> None:
    public = {name for name, _ in inspect.getmembers(Writer, inspect.isfunction) if not name.startswith("_")}
    assert set(METHODS) == public


@pytest.mark.parametrize("fault", ["locked", "out of reach"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_while_storage_is_down(stopped: Harness, method: str, fault: str) -> None:
    with stopped:
        with down(fault, stopped):
            check = METHODS[method](stopped)
        assert check()
        if method != "stop":
            stopped.settle()
            until(lambda: stopped.writer.last_error is None)
            assert stopped.writer.write(lambda _: 7) == 7
    assert "half-written" not in str(content(stopped.database.url)["ccr_migrations"])


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_damaged_file_is_no_longer_written(
    database_url: str, stopped: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    stopped.database.close()
    with damaged(path_of(database_url)):
        harness = Harness(Database(database_url, writable=True, pool_size=1), filled=True)
        harness.writer.start()
        harness.append("a", 0)
        for _ in range(2):
            with pytest.raises(Unavailable, match="Nothing was stored: the database is damaged"):
                harness.writer.write(rename)
        assert not harness.writer.stop(time.monotonic())
        assert "were not stored" in caplog.text
        harness.database.close()
    assert content(database_url)["ccr_run_messages"] == []


# ---- faults


def test_a_write_that_is_given_up_is_never_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.storage.writer.WRITE_TIMEOUT", 0.1)
    url = f"sqlite:///{tmp_path}/db.sqlite"
    database, reader = Database(url, writable=True, pool_size=1), Database(url)
    migrate(database)
    with Harness(database) as harness:
        other = lock(tmp_path / "db.sqlite")
        with pytest.raises(Unavailable) as refusal:
            harness.writer.write(lambda transaction: transaction.execute("UPDATE ccr_runs SET prompt = 'late'"))
        assert refusal.value.code == "STORAGE_UNAVAILABLE"
        other.execute("ROLLBACK")
        other.close()
        harness.settle()
        assert reader.rows("SELECT id FROM ccr_runs WHERE prompt = 'late'") == []
    database.close()
    reader.close()


def test_giving_up_a_write_in_progress_takes_effect_when_its_transaction_fails(
    harness: Harness, reader: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.storage.writer.WRITE_TIMEOUT", 0.1)
    given_up = threading.Event()
    tries: list[int] = []

    def work(transaction: Transaction) -> None:
        tries.append(1)
        transaction.execute("UPDATE ccr_runs SET prompt = 'late' WHERE id = 'a'")
        given_up.wait(SOON)
        raise StorageDown("the disk is full just now")

    give_up = WriteTask.give_up

    def give_up_and_signal(write: WriteTask[None], reason: Exception) -> None:
        give_up(write, reason)
        given_up.set()

    monkeypatch.setattr(WriteTask, "give_up", give_up_and_signal)
    begun = time.monotonic()
    with pytest.raises(Unavailable) as refusal:
        harness.writer.write(work)
    assert refusal.value.code == "STORAGE_UNAVAILABLE"
    assert time.monotonic() - begun < 5
    harness.settle()
    assert tries == [1]
    assert reader.rows("SELECT id FROM ccr_runs WHERE prompt = 'late'") == []


def test_a_refused_message_fails_only_its_own_run(harness: Harness, reader: Database) -> None:
    held = threading.Event()
    blocking = harness.writer.submit(lambda _: held.wait(SOON))
    until(lambda: blocking._in_progress)
    # One batch: `b` sends index 1 twice, which storage can never take.
    harness.append("a", 0, 1)
    harness.append("b", 0, 1, 1, 2, 3)
    harness.append("a", 2, 3)
    held.set()
    harness.settle()
    harness.append("b", 4)
    harness.append("a", 4)
    harness.settle()

    assert indexes(reader, "a") == [0, 1, 2, 3, 4]
    assert indexes(reader, "b") == [0, 1]
    assert [run for run, _ in harness.refused] == ["b"]
    assert harness.writer._budget._charged == 0


def test_a_fault_in_the_indexing_of_a_message_fails_only_its_own_run(
    harness: Harness, reader: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_messages(_: Transaction, messages: Sequence[Message]) -> None:
        if any((message.run_id, message.index) == ("b", 1) for message in messages):
            raise RecursionError("too deep")

    monkeypatch.setattr(search, "add_messages", add_messages)
    held = threading.Event()
    harness.writer.submit(lambda _: held.wait(SOON))
    harness.append("a", 0)
    harness.append("b", 0, 1, 2)
    harness.append("a", 1)
    held.set()
    harness.settle()

    assert [indexes(reader, "a"), indexes(reader, "b")] == [[0, 1], [0]]
    assert [run for run, _ in harness.refused] == ["b"]


def test_a_message_of_an_unknown_run_is_reported(harness: Harness) -> None:
    harness.append("nobody", 0)
    harness.settle()

    assert [run for run, _ in harness.refused] == ["nobody"]


def test_after_an_uncertain_commit_nothing_is_stored_twice(postgresql: str) -> None:
    url = f"{postgresql}/postgres"
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE uncertain")
    database = Database(f"{postgresql}/uncertain", writable=True, pool_size=1)
    reader = Database(f"{postgresql}/uncertain")
    migrate(database)
    with Harness(database) as harness:
        original = database._pool.commit
        broken: list[int] = []

        def commit_and_lose_the_answer() -> None:
            original()
            if len(broken) < 3:
                broken.append(1)
                raise psycopg.OperationalError("the connection was lost in COMMIT")

        database._pool.commit = commit_and_lose_the_answer  # type: ignore[method-assign]
        harness.append("a", *range(20))
        harness.settle()
        assert broken
        assert indexes(reader, "a") == list(range(20))
        assert harness.refused == []
    database.close()
    reader.close()


def test_nothing_is_lost_when_postgresql_drops_its_connections(postgresql: str) -> None:
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as admin:
        admin.execute("CREATE DATABASE dropped")
        database = Database(f"{postgresql}/dropped", writable=True, pool_size=1)
        reader = Database(f"{postgresql}/dropped")
        migrate(database)
        with Harness(database) as harness:
            for index in range(40):
                harness.append("a", index)
                if index % 5 == 0:
                    admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'dropped'")
            harness.settle()
            assert indexes(reader, "a") == list(range(40))
        database.close()
        reader.close()


def test_a_write_that_may_be_stored_is_never_reported_as_not_stored(
    postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.storage.writer.WRITE_TIMEOUT", 0.1)
    monkeypatch.setattr("ccm.core.storage.writer.OUTCOME_TIMEOUT", 0.1)
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as admin:
        admin.execute("CREATE DATABASE unknown_outcome")
    database = Database(f"{postgresql}/unknown_outcome", writable=True, pool_size=1)
    reader = Database(f"{postgresql}/unknown_outcome")
    migrate(database)
    with Harness(database) as harness:
        commit, connect = database._pool.commit, database._pool.take
        mended = threading.Event()

        def commit_and_lose_the_server() -> None:
            commit()
            database._pool.commit = commit  # type: ignore[method-assign]
            database._pool.take = no_server  # type: ignore[method-assign]
            raise psycopg.OperationalError("the connection was lost in COMMIT")

        def no_server() -> Any:
            if not mended.is_set():
                raise StorageDown("it is being restarted")
            return connect()

        def work(transaction: Transaction) -> None:
            transaction.execute("UPDATE ccr_runs SET prompt = 'stored' WHERE id = 'a'")

        database._pool.commit = commit_and_lose_the_server  # type: ignore[method-assign]
        followed: list[None] = []
        with pytest.raises(Unavailable) as refusal:
            harness.writer.write(work, followed.append)
        assert refusal.value.code == "OUTCOME_UNKNOWN"
        assert "Idempotency-Key" in refusal.value.message
        assert reader.rows("SELECT id FROM ccr_runs WHERE prompt = 'stored'")

        mended.set()
        harness.settle()
        assert followed == [None]  # on_commit was called although the caller had given up
    database.close()
    reader.close()


def test_a_commit_that_the_server_never_answers_times_out(
    postgresql_server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.storage.writer.WRITE_TIMEOUT", 0.1)
    monkeypatch.setattr("ccm.core.storage.writer.OUTCOME_TIMEOUT", 0.1)
    url = postgresql_server.new_database()
    database, reader = Database(url, writable=True, pool_size=1), Database(url)
    migrate(database)
    with Harness(database) as harness, ExitStack() as stack:

        def work(transaction: Transaction) -> None:
            transaction.execute("UPDATE ccr_runs SET prompt = 'stored' WHERE id = 'a'")
            stack.enter_context(postgresql_server.standing_still())

        begun = time.monotonic()
        with pytest.raises(Unavailable) as refusal:
            harness.writer.write(work)
        assert refusal.value.code == "OUTCOME_UNKNOWN"
        assert time.monotonic() - begun < 5
        stack.close()
        harness.settle()
        assert reader.rows("SELECT id FROM ccr_runs WHERE prompt = 'stored'")
    database.close()
    reader.close()


def test_a_full_disk_is_still_reported_after_all_writes_are_given_up(
    small_disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccm.core.storage.writer.WRITE_TIMEOUT", 0.1)
    url = f"sqlite:///{small_disk.path}/db.sqlite"
    database, reader = Database(url, writable=True, pool_size=1), Database(url)
    migrate(database)
    with Harness(database, budget=2**24) as harness:

        def work(transaction: Transaction) -> None:
            transaction.execute("UPDATE ccr_runs SET prompt = :text WHERE id = 'a'", text="x" * 2**14)

        small_disk.fill()
        with pytest.raises(Unavailable, match="the disk of the database is full"):
            while True:  # the write-ahead log still has some room
                harness.writer.write(work)
        tries: list[float] = []
        original = database.transaction

        def counted(uncertain: bool = False) -> Any:
            tries.append(time.monotonic())
            return original(uncertain)

        database.transaction = counted  # type: ignore[method-assign]
        until(lambda: len(tries) >= 3)  # with nothing left to write
        assert harness.writer.last_error == "the disk of the database is full"
        assert reader.rows("SELECT id FROM ccr_runs ORDER BY id") == [{"id": "a"}, {"id": "b"}]

        small_disk.grow()
        until(lambda: harness.writer.last_error is None)
        harness.writer.write(work)
    database.close()
    reader.close()


# ---- stopping


def test_stop_does_not_wait_for_writes_that_were_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccm.core.storage.writer.WRITE_TIMEOUT", 0.1)
    database = Database(f"sqlite:///{tmp_path}/db.sqlite", writable=True, pool_size=1)
    migrate(database)
    harness = Harness(database)
    harness.writer.start()
    other = lock(tmp_path / "db.sqlite")
    with pytest.raises(Unavailable):
        harness.writer.write(lambda _: None)

    begun = time.monotonic()
    assert harness.writer.stop(begun + SOON)
    assert time.monotonic() - begun < 5
    other.close()
    database.close()


def test_stop_writes_the_queue_and_refuses_further_writes(writable: Database, reader: Database) -> None:
    harness = Harness(writable)
    harness.writer.start()
    harness.append("a", *range(100))

    assert harness.writer.stop(time.monotonic() + SOON)
    assert harness.writer.stop(time.monotonic() + SOON)
    assert indexes(reader, "a") == list(range(100))
    with pytest.raises(Unavailable) as refusal:
        harness.writer.write(lambda _: None)
    assert refusal.value.code == "SHUTTING_DOWN"


def test_stop_gives_up_at_its_deadline_and_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = Database(f"sqlite:///{tmp_path}/db.sqlite", writable=True, pool_size=1)
    migrate(database)
    harness = Harness(database)
    harness.writer.start()
    other = lock(tmp_path / "db.sqlite")
    harness.append("a", 0, 1)
    pending = harness.writer.submit(lambda _: None)

    assert not harness.writer.stop(time.monotonic())
    with pytest.raises(Unavailable):
        pending.future.result(SOON)
    assert "were not stored" in caplog.text
    other.close()
    database.close()


# ---- regressions


def test_a_value_that_cannot_be_bound_fails_only_its_own_run(harness: Harness, reader: Database) -> None:
    held = threading.Event()
    blocking = harness.writer.submit(lambda _: held.wait(SOON))
    until(lambda: blocking._in_progress)
    harness.append("a", 0, 1)

    async def put() -> None:
        await harness.writer.append(Message("b", "b", 0, "\ud800", "{}", timestamp()))

    asyncio.run(put())
    harness.append("a", 2)
    held.set()
    harness.settle()

    assert indexes(reader, "a") == [0, 1, 2]
    assert indexes(reader, "b") == []
    assert [run for run, _ in harness.refused] == ["b"]


def test_readers_beyond_the_pool_size_wait_their_turn(reader: Database, writable: Database) -> None:
    barrier = threading.Barrier(40)
    done: list[int] = []

    def read(number: int) -> None:
        barrier.wait(SOON)
        with reader.transaction() as transaction:
            transaction.value("SELECT 1")
            threading.Event().wait(0.02)  # a read that takes its time
            done.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(40)]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert sorted(done) == list(range(40))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_waiting_run_is_registered_once(
    writable: Database, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    attempts = 0
    monkeypatch.setattr("ccm.core.storage.message_budget.ROOM_INTERVAL", 0.005)
    with Harness(writable, budget=10) as harness:
        budget = harness.writer._budget
        try_charge = budget.try_charge

        def count(size: int, waiter: Any = None) -> bool:
            nonlocal attempts
            attempts += 1
            return try_charge(size, waiter)

        monkeypatch.setattr(budget, "try_charge", count)
        other = lock(Path(database_url.removeprefix("sqlite:///")))
        waiting = threading.Thread(target=lambda: harness.append("a", 0, 1, text="x" * 10))
        waiting.start()
        until(lambda: attempts > 20)
        assert len(budget._waiters) == 1
        other.execute("ROLLBACK")
        other.close()
        waiting.join(SOON)
        assert not waiting.is_alive()
        assert budget._waiters == set()


def test_call_later_calls_in_the_writer_thread(harness: Harness) -> None:
    called: list[str] = []
    harness.writer.call_later(0.01, lambda: called.append(threading.current_thread().name))
    harness.writer.call_later(3600, lambda: called.append("too early"))
    until(lambda: called)
    harness.settle()
    assert called == ["writer"]


def test_the_writer_survives_a_fault_of_its_own(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(harness.writer, "_attempt", fail)
        with pytest.raises(Unavailable):
            harness.writer.write(lambda _: None)
    assert harness.writer.write(lambda _: 7) == 7
