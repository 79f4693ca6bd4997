"""Real faults of storage: how transactions behave, and which errors they raise."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psycopg
import pytest

from ccm.db import heartbeat
from ccm.db.driver import sqlite_file
from ccm.db.driver.database import Database
from ccm.db.driver.lock import service_lock
from ccm.db.driver.migrate import migrate
from ccm.errors import DatabaseDamaged, DatabaseRefused, DatabaseTaken, StorageDown
from tests.postgresql import PostgreSQLServer

SOON = 30.0


def write(database: Database) -> None:
    with database.transaction() as transaction:
        heartbeat.beat(transaction)


def read(database: Database) -> object:
    return database.rows("SELECT id FROM ccr_heartbeat")


def sqlite(folder: Path) -> tuple[Path, Database, Database]:
    """Return a new database with some content: its path, a writer and a reader."""
    path = folder / "db.sqlite"
    url = f"sqlite:///{path}"
    sqlite_file.prepare(url)
    writable = Database(url, writable=True, pool_size=1)
    migrate(writable)
    reader = Database(url, watch=writable.watch)
    write(writable)
    read(reader)
    return path, writable, reader


# ---- the right to write to PostgreSQL


def new_database(postgresql: str, name: str) -> str:
    with psycopg.connect(f"{postgresql}/postgres", autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    return f"{postgresql}/{name}"


def end_connections(url: str) -> None:
    """End all other connections, as a restart or a firewall does."""
    with psycopg.connect(url, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


def test_a_second_writer_is_refused_until_the_first_has_closed(postgresql: str) -> None:
    url = new_database(postgresql, "right_to_write")
    first, second = (Database(url, writable=True, pool_size=1) for _ in range(2))
    migrate(first)
    with pytest.raises(DatabaseTaken):
        write(second)
    reader = Database(url)
    read(reader)  # reading does not need the right

    first.close()
    write(second)
    second.close()
    reader.close()


def test_nothing_is_committed_after_the_right_to_write_is_lost(postgresql: str) -> None:
    url = new_database(postgresql, "lost_right")
    first, second = (Database(url, writable=True, pool_size=1) for _ in range(2))
    migrate(first)
    with pytest.raises(StorageDown), first.transaction() as transaction:
        transaction.execute("UPDATE ccr_heartbeat SET padding = 'of the first'")
        end_connections(url)
        with second.transaction() as theirs:
            theirs.execute("UPDATE ccr_heartbeat SET padding = 'of the second'")

    with pytest.raises(DatabaseTaken):
        write(first)
    reader = Database(url)
    assert reader.rows("SELECT padding FROM ccr_heartbeat") == [{"padding": "of the second"}]
    reader.close()

    second.close()
    write(first)  # it recovers by itself
    first.close()


def test_a_new_connection_retakes_the_right_to_write(postgresql: str) -> None:
    url = new_database(postgresql, "taken_again")
    first, second = (Database(url, writable=True, pool_size=1) for _ in range(2))
    migrate(first)
    end_connections(url)
    write(first)
    with pytest.raises(DatabaseTaken):
        write(second)
    first.close()


def test_a_second_service_is_refused_if_only_the_writer_is_connected(postgresql: str) -> None:
    url = new_database(postgresql, "only_the_writer")
    service = ExitStack()
    service.enter_context(service_lock(url))
    writable = Database(url, writable=True, pool_size=1)
    migrate(writable)
    end_connections(url)
    write(writable)

    with service_lock(url), pytest.raises(DatabaseRefused, match="Another CC Manager is at work on this database"):
        migrate(Database(url, writable=True, pool_size=1))
    writable.close()
    service.close()


def test_a_command_writes_while_it_holds_the_lock(database_url: str) -> None:
    for _ in range(2):
        with service_lock(database_url, patience=5):
            database = Database(database_url, writable=True, pool_size=1)
            migrate(database)
            write(database)
            database.close()


# ---- the SQLite file is removed or replaced


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_removed_file_is_noticed_and_may_return(tmp_path: Path, suffix: str, replaced: bool) -> None:
    path, writable, reader = sqlite(tmp_path)
    file, away = Path(f"{path}{suffix}"), tmp_path / "away"
    file.rename(away)
    if replaced:
        file.write_bytes(away.read_bytes())

    for action in (partial(write, writable), partial(read, reader)):
        with pytest.raises(StorageDown, match="has been removed or replaced") as fault:
            action()
        assert str(tmp_path) in str(fault.value)  # for the log
        assert str(tmp_path) not in fault.value.summary
    assert file.exists() == replaced  # no new file was created

    away.rename(file)
    write(writable)
    read(reader)
    writable.close()
    reader.close()


def test_no_connection_is_opened_to_another_file(tmp_path: Path) -> None:
    path, writable, reader = sqlite(tmp_path)
    reader.close()
    late = Database(f"sqlite:///{path}", watch=writable.watch)
    path.rename(tmp_path / "away")
    with pytest.raises(StorageDown, match="removed"):
        read(late)
    assert not path.exists()
    (tmp_path / "away").rename(path)
    read(late)
    writable.close()
    late.close()


def test_a_commit_into_a_removed_file_is_not_acknowledged(tmp_path: Path) -> None:
    path, writable, reader = sqlite(tmp_path)
    with pytest.raises(StorageDown, match="removed") as fault, writable.transaction() as transaction:
        heartbeat.beat(transaction)
        path.rename(tmp_path / "away")
    assert fault.value.may_be_committed
    (tmp_path / "away").rename(path)
    writable.close()
    reader.close()


def test_closing_saves_the_content_of_a_removed_log(tmp_path: Path) -> None:
    path, writable, reader = sqlite(tmp_path)
    with writable.transaction() as transaction:
        transaction.execute("UPDATE ccr_heartbeat SET padding = 'only in the log'")
    Path(f"{path}-wal").unlink()
    with pytest.raises(StorageDown):
        write(writable)
    writable.close()
    reader.close()

    with sqlite3.connect(path) as plain:
        assert plain.execute("SELECT padding FROM ccr_heartbeat").fetchall() == [("only in the log",)]
    plain.close()


# ---- a damaged SQLite file


def rubbish(size: int) -> bytes:
    return random.Random(7).randbytes(size)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "a page": lambda file: file[: 4096 * 3] + rubbish(4096) + file[4096 * 4 :],
    "the schema": lambda file: file[:100] + rubbish(3996) + file[4096:],
    "the header": lambda file: file[:16] + rubbish(44) + file[60:],
    "the second half": lambda file: file[: len(file) // 8192 * 4096],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_unchanged(tmp_path: Path, damage: str) -> None:
    path, writable, reader = sqlite(tmp_path)
    reader.close()
    writable.close()
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    before = path.read_bytes()

    with pytest.raises(DatabaseRefused, match=r"db\.sqlite is damaged: ") as refusal:
        sqlite_file.check(f"sqlite:///{path}")
    assert refusal.value.exit_code == 3
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["db.sqlite"]


def test_a_check_reads_the_log_and_changes_nothing(tmp_path: Path) -> None:
    path, writable, reader = sqlite(tmp_path)
    copy = tmp_path / "copy.sqlite"
    for suffix in ("", "-wal"):
        Path(f"{copy}{suffix}").write_bytes(Path(f"{path}{suffix}").read_bytes())
    before = copy.read_bytes()
    assert sqlite_file.check(f"sqlite:///{copy}")
    assert copy.read_bytes() == before
    writable.close()
    reader.close()


def test_an_empty_file_with_a_log_is_refused(tmp_path: Path) -> None:
    path, writable, reader = sqlite(tmp_path)
    log = Path(f"{path}-wal").read_bytes()
    writable.close()
    reader.close()
    path.write_bytes(b"")
    Path(f"{path}-wal").write_bytes(log)

    with pytest.raises(DatabaseRefused, match="damaged: it is empty"):
        sqlite_file.prepare(f"sqlite:///{path}")
    assert path.read_bytes() == b""
    assert Path(f"{path}-wal").read_bytes() == log


def test_the_check_of_a_large_file_stops_at_its_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, writable, reader = sqlite(tmp_path)
    with writable.transaction() as transaction:
        transaction.script(
            "CREATE TABLE large AS WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n "
            "LIMIT 20000) SELECT i, hex(randomblob(100)) AS text FROM n"
        )
    writable.close()
    reader.close()
    assert sqlite_file.check(f"sqlite:///{path}")
    monkeypatch.setattr("ccm.db.driver.sqlite_file.CHECK_TIMEOUT", -1.0)
    assert not sqlite_file.check(f"sqlite:///{path}")


def test_damage_found_by_a_read_stops_all_writes(tmp_path: Path) -> None:
    path, writable, reader = sqlite(tmp_path)
    with writable.transaction() as transaction:
        transaction.script("CREATE TABLE hurt AS SELECT 1 AS one")
    with sqlite3.connect(path, isolation_level=None) as plain:
        page = plain.execute("SELECT rootpage FROM sqlite_master WHERE name = 'hurt'").fetchone()[0]
        plain.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    plain.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(rubbish(4096))

    fresh = Database(f"sqlite:///{path}", watch=writable.watch)
    with pytest.raises(DatabaseDamaged):
        fresh.rows("SELECT * FROM hurt")
    with pytest.raises(DatabaseDamaged):
        write(writable)
    read(fresh)  # undamaged tables can still be read
    for database in (writable, reader, fresh):
        database.close()


# ---- PostgreSQL does not answer, or refuses


def test_reads_from_a_server_that_hangs_fail_in_time(postgresql_server: PostgreSQLServer) -> None:
    url = postgresql_server.new_database() + "?connect_timeout=2"
    writable = Database(url, writable=True, pool_size=1)
    migrate(writable)
    reader = Database(url, pool_size=4, answer_seconds=1.0)
    for _ in range(2):
        together(reader, 4)  # connections that will be dead
    faults: list[StorageDown] = []

    def try_to_read() -> None:
        try:
            read(reader)
        except StorageDown as fault:
            faults.append(fault)

    begun = time.monotonic()
    with postgresql_server.standing_still():
        threads = [threading.Thread(target=try_to_read, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, begun + 8 - time.monotonic()))  # one after the other they would take 24
        assert len(faults) == 8
    read(reader)
    write(writable)
    writable.close()
    reader.close()


def together(reader: Database, count: int) -> None:
    barrier = threading.Barrier(count)

    def read_together() -> None:
        with reader.transaction() as transaction:
            transaction.value("SELECT 1")
            barrier.wait(SOON)

    threads = [threading.Thread(target=read_together) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)


def test_the_server_cancels_a_statement_beyond_the_time_limit(postgresql: str) -> None:
    reader = Database(f"{postgresql}/postgres", answer_seconds=1.0)
    with pytest.raises(StorageDown, match="statement timeout") as fault:
        reader.rows("SELECT pg_sleep(60)")
    assert fault.value.summary == "the database server takes too long"
    reader.close()


def test_a_command_has_no_time_limit_for_statements(postgresql: str) -> None:
    database = Database(f"{postgresql}/postgres", writable=True, pool_size=1)
    with database.transaction() as transaction:
        assert transaction.value("SHOW statement_timeout") == "0"
        assert transaction.value("SHOW lock_timeout") == "0"
    database.close()


def test_a_read_only_server_counts_as_down(postgresql_server: PostgreSQLServer) -> None:
    writable = Database(postgresql_server.new_database(), writable=True, pool_size=1)
    migrate(writable)
    postgresql_server.configure(default_transaction_read_only="on")
    with pytest.raises(StorageDown) as fault:
        while True:  # an open connection notices the change a moment later
            write(writable)
    assert fault.value.summary == "the database is read-only"
    postgresql_server.configure(default_transaction_read_only="off")
    write(writable)
    writable.close()


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_restarted_server_is_used_again(postgresql_server: PostgreSQLServer, mode: str) -> None:
    url = postgresql_server.new_database()
    writable, reader = Database(url, writable=True, pool_size=1), Database(url)
    migrate(writable)
    read(reader)
    postgresql_server.stop(mode)
    for action in (partial(write, writable), partial(read, reader)):
        with pytest.raises(StorageDown) as fault:
            action()
        assert fault.value.summary == "the database server cannot be reached"
        assert "127.0.0.1" not in fault.value.summary
    postgresql_server.start()
    write(writable)
    read(reader)
    writable.close()
    reader.close()
