"""The parts of psycopg that ccm's connections to PostgreSQL use. These tests need no server."""

from __future__ import annotations

import inspect
import socket
from collections.abc import Generator
from typing import Any

import psycopg
import pytest
from psycopg import conninfo, waiting
from psycopg.rows import tuple_row

from ccm.db.driver.errors import storage_error
from ccm.db.driver.postgresql import NETWORK, Connection, NoAnswer
from ccm.errors import StorageDown, StorageRejected


def test_a_connection_waits_in_a_method_that_can_be_overridden() -> None:
    assert list(inspect.signature(psycopg.Connection.wait).parameters)[:2] == ["self", "gen"], (
        "Connection.wait overrides it to limit the wait for every answer"
    )


@pytest.mark.parametrize(
    "function",
    [psycopg.Connection.commit, psycopg.Connection.rollback, psycopg.Cursor.execute],
    ids=["commit", "rollback", "execute"],
)
def test_every_function_that_needs_an_answer_calls_wait(function: Any) -> None:
    assert ".wait(" in inspect.getsource(function), f"Connection.wait would not limit {function.__qualname__}"


def test_a_wait_wakes_its_generator_after_each_interval() -> None:
    woken: list[int] = []

    def read() -> Generator[int, int, str]:
        woken.append((yield waiting.Wait.R))
        return "done"

    here, there = socket.socketpair()
    with here, there:
        result = waiting.wait(read(), here.fileno(), interval=0.01)  # type: ignore[arg-type]

    assert (result, woken) == ("done", [0]), "Connection._limit checks the time when it is woken with 0"


def test_a_wait_has_a_default_interval() -> None:
    default = inspect.signature(psycopg.Connection.wait).parameters["interval"].default

    assert 0 < default <= 1, "Connection._limit would check the time too rarely or never"


class SilentServer:
    """A libpq connection to a server that never answers."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection.fileno()
        self.finished = False

    def finish(self) -> None:
        self.finished = True


def test_the_wait_for_a_silent_server_ends() -> None:
    def read() -> Generator[int, int, None]:
        while True:
            yield waiting.Wait.R

    here, there = socket.socketpair()
    with here, there:
        connection: Any = Connection.__new__(Connection)
        connection.pgconn = server = SilentServer(here)
        connection.answer_seconds = 0.0
        with pytest.raises(NoAnswer):
            connection.wait(read())
        del connection.pgconn  # psycopg would warn of an unclosed connection

    assert server.finished, "Connection._limit must close the connection, or a ROLLBACK waits just as long"


def test_a_libpq_connection_has_finish() -> None:
    assert callable(getattr(psycopg.pq.PGconn, "finish", None)), "Connection._limit calls pgconn.finish()"


@pytest.mark.parametrize("name", sorted(NETWORK))
def test_libpq_knows_the_parameter(name: str) -> None:
    made = conninfo.make_conninfo("", **{name: NETWORK[name]})

    assert conninfo.conninfo_to_dict(made) == {name: str(NETWORK[name])}, f"NETWORK sets {name}"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (psycopg.errors.AdminShutdown(), StorageDown),
        (psycopg.errors.QueryCanceled(), StorageDown),
        (psycopg.errors.LockNotAvailable(), StorageDown),
        (psycopg.errors.ReadOnlySqlTransaction(), StorageDown),
        (psycopg.OperationalError(), StorageDown),
        (psycopg.InterfaceError(), StorageDown),
        (NoAnswer("nothing"), StorageDown),
        (psycopg.errors.ProgramLimitExceeded(), StorageRejected),
        (psycopg.errors.UniqueViolation(), StorageRejected),
        (psycopg.ProgrammingError(), StorageRejected),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_storage_error_recognises_the_error(error: psycopg.Error, kind: type) -> None:
    assert type(storage_error(error)) is kind, (
        f"storage_error() recognises {type(error).__name__} by its class or sqlstate"
    )


@pytest.mark.parametrize(
    ("name", "state"),
    [("LockNotAvailable", "55P03"), ("AdminShutdown", "57P01"), ("QueryCanceled", "57014"), ("DiskFull", "53100")],
)
def test_an_error_class_has_its_sqlstate(name: str, state: str) -> None:
    assert getattr(psycopg.errors, name).sqlstate == state, (
        f"storage_error() and _take_right_to_write() check for {name}"
    )


def test_a_row_is_a_tuple_by_default() -> None:
    default = inspect.signature(psycopg.Connection.connect).parameters["row_factory"].default

    assert default in (None, tuple_row), "Transaction.rows names the columns itself"
