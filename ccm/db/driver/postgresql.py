"""Connections to PostgreSQL that never wait forever. A writing one holds the right to write.

The right is an advisory lock of the session that writes. If the connection is lost, so is the lock, and nothing more
can be committed through that session. A new connection must take the right again, and cannot while another service
holds it or while the server has not ended the lost session. So the outcome of a lost session's COMMIT is settled before
the new connection looks for it.

The module overrides an internal of psycopg (`Connection.wait`); tests/contracts/test_psycopg.py lists everything that
it relies on.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import psycopg

from ccm.errors import DatabaseTaken

# An arbitrary number that no other program should use in this PostgreSQL database: "ccmwrite" in ASCII.
RIGHT_TO_WRITE = int.from_bytes(b"ccmwrite")
# How long a new connection waits for the right. The server ends the session of a killed service within that time.
RIGHT_TIMEOUT = "1s"
# When the kernel gives up a server whose host or network has disappeared. Parameters in the database's URL override
# these.
NETWORK: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# The same for the server: without it, the lock of a service whose host has disappeared would stay for hours.
SERVER_KEEPALIVES = (
    "SET tcp_keepalives_idle = 10",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
)
READ_SNAPSHOT = "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"


class NoAnswer(psycopg.OperationalError):
    """The server accepts data but does not answer."""


class Connection(psycopg.Connection[Any]):
    """A connection that gives up a server after `answer_seconds` without an answer; None waits forever.

    The kernel's timeouts do not help if the server process hangs, because the TCP connection is intact then.
    """

    answer_seconds: float | None = None

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        if self.answer_seconds is not None:
            gen = self._limit(gen, self.answer_seconds)
        return super().wait(gen, *args, **kwargs)

    def _limit(self, gen: Generator[int, int, Any], seconds: float) -> Generator[int, int, Any]:
        try:
            wanted = next(gen)
            last_answer = time.monotonic()
            while True:
                ready = yield wanted
                now = time.monotonic()
                if ready:
                    last_answer = now
                elif now - last_answer > seconds:
                    # Close the connection, or the ROLLBACK that follows would wait for as long again.
                    self.pgconn.finish()
                    raise NoAnswer(f"PostgreSQL has not answered for {seconds:.0f} seconds")
                wanted = gen.send(ready)
        except StopIteration as done:
            return done.value


def connect(
    *, writable: bool, answer_seconds: float | None, statement_seconds: float | None, **parameters: Any
) -> Connection:
    """Open a connection.

    Args:
        writable: take the right to write, for as long as the connection lives.
        answer_seconds: how long to wait for an answer from the server; None waits forever.
        statement_seconds: when the server cancels a statement; None for never.

    Raises:
        DatabaseTaken: another connection has the right to write.
    """
    connection = Connection.connect(**{**NETWORK, **parameters})
    try:
        if answer_seconds is not None:
            connection.answer_seconds = answer_seconds
        if statement_seconds is not None:
            connection.execute(f"SET statement_timeout = {statement_seconds * 1000:.0f}")
        if writable:
            _take_right_to_write(connection)
        else:
            # Let each transaction read one snapshot, as on SQLite. A stream reads the last event and the approvals as
            # of that event; it must not miss a change committed in between.
            connection.execute(READ_SNAPSHOT)
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def _take_right_to_write(connection: Connection) -> None:
    for statement in SERVER_KEEPALIVES:
        connection.execute(statement)
    connection.execute(f"SET LOCAL lock_timeout = '{RIGHT_TIMEOUT}'")
    try:
        connection.execute("SELECT pg_advisory_lock(%s)", [RIGHT_TO_WRITE])
    except psycopg.errors.LockNotAvailable:
        raise DatabaseTaken("another connection has the right to write to this database") from None
