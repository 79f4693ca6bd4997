"""psycopg: what ccm's connections to PostgreSQL lean on. No server is needed."""

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
        "Connection.wait overrides it, and bounds the wait for every answer"
    )


@pytest.mark.parametrize(
    "function",
    [psycopg.Connection.commit, psycopg.Connection.rollback, psycopg.Cursor.execute],
    ids=["commit", "rollback", "execute"],
)
def test_what_needs_an_answer_goes_through_wait(function: Any) -> None:
    assert ".wait(" in inspect.getsource(function), f"{function.__qualname__} would not be bounded by Connection.wait"


def test_a_wait_wakes_its_generator_with_nothing_now_and_then() -> None:
    woken: list[int] = []

    def read() -> Generator[int, int, str]:
        woken.append((yield waiting.Wait.R))
        return "done"

    here, there = socket.socketpair()
    with here, there:
        result = waiting.wait(read(), here.fileno(), interval=0.01)  # type: ignore[arg-type]

    assert (result, woken) == ("done", [0]), "Connection._limit checks the time when nothing is ready"


def test_a_wait_by_default_has_an_interval() -> None:
    default = inspect.signature(psycopg.Connection.wait).parameters["interval"].default

    assert 0 < default <= 1, "Connection._limit would check the time too rarely, or never"


class SilentServer:
    """Stands for a libpq connection to a server that says nothing."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection.fileno()
        self.finished = False

    def finish(self) -> None:
        self.finished = True


def test_a_server_that_says_nothing_is_given_up() -> None:
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
        del connection.pgconn  # psycopg would warn of a connection that was not closed

    assert server.finished, "Connection._limit must close the connection, or a ROLLBACK waits for as long"


def test_a_connection_of_libpq_can_be_finished() -> None:
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
def test_an_error_has_its_class_and_its_state(error: psycopg.Error, kind: type) -> None:
    assert type(storage_error(error)) is kind, f"storage_error() tells {type(error).__name__} by its class or sqlstate"


@pytest.mark.parametrize(
    ("name", "state"),
    [("LockNotAvailable", "55P03"), ("AdminShutdown", "57P01"), ("QueryCanceled", "57014"), ("DiskFull", "53100")],
)
def test_an_error_class_has_its_sqlstate(name: str, state: str) -> None:
    assert getattr(psycopg.errors, name).sqlstate == state, f"storage_error() and _take_right_to_write() know {name}"


def test_a_row_is_a_tuple_by_default() -> None:
    default = inspect.signature(psycopg.Connection.connect).parameters["row_factory"].default

    assert default in (None, tuple_row), "Transaction.rows names the columns itself"
