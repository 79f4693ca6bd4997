"""A connection to PostgreSQL that never waits for ever, and, if it is to write, has the right to.

The right is an advisory lock of the very session that writes. When the connection is lost the lock is lost with it, and
nothing can be committed through what is left; a new connection has to take the right again, and does not get it while
another service has it, or while the server has not yet ended the lost one: so what that one was about to commit is
decided before the new one looks.

It reaches into psycopg (`Connection.wait`), and tests/contracts/test_psycopg.py names all of that.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import psycopg

from ccm.errors import DatabaseTaken

# Any number that nobody else of this PostgreSQL database uses: "ccmwrite" in ASCII.
RIGHT_TO_WRITE = int.from_bytes(b"ccmwrite")
# How long a new connection waits for the right: a service that was killed is let go of by the server in no time.
RIGHT_TIMEOUT = "1s"
# A server that has gone without a word (its host, or the way to it) is given up by the kernel after this; what the
# database's URL says counts for more.
NETWORK: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
# The same from the server's side: the lock of a service whose host has gone is not to outlive it by hours.
SERVER_KEEPALIVES = (
    "SET tcp_keepalives_idle = 10",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
)
READ_ONE_MOMENT = "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"


class NoAnswer(psycopg.OperationalError):
    """The server is there and says nothing."""


class Connection(psycopg.Connection[Any]):
    """Gives up a server that says nothing for `answer_seconds`; None waits for ever.

    No timeout of the kernel's helps against a server process that stands still: the connection is in order then.
    """

    answer_seconds: float | None = None

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        if self.answer_seconds is not None:
            gen = self._bounded(gen, self.answer_seconds)
        return super().wait(gen, *args, **kwargs)

    def _bounded(self, gen: Generator[int, int, Any], seconds: float) -> Generator[int, int, Any]:
        try:
            wanted = next(gen)
            heard = time.monotonic()
            while True:
                ready = yield wanted
                now = time.monotonic()
                if ready:
                    heard = now
                elif now - heard > seconds:
                    # Without it a ROLLBACK would be sent after it, and waited for as long.
                    self.pgconn.finish()
                    raise NoAnswer(f"PostgreSQL has not answered for {seconds:.0f} seconds")
                wanted = gen.send(ready)
        except StopIteration as done:
            return done.value


def connect(
    *, writable: bool, answer_seconds: float | None, statement_seconds: float | None, **parameters: Any
) -> Connection:
    """A new connection.

    Args:
        writer: it is to have the right to write, as long as it lives.
        answer_seconds: how long to wait for an answer of the server; None for ever.
        statement_seconds: after how long the server gives up a statement; None for never.

    Raises:
        DatabaseTaken: another one has the right to write.
    """
    connection = Connection.connect(**{**NETWORK, **parameters})
    try:
        if answer_seconds is not None:
            connection.answer_seconds = answer_seconds
        if statement_seconds is not None:
            connection.execute(f"SET statement_timeout = {statement_seconds * 1000:.0f}")
        if writable:
            _take_right(connection)
        else:
            # What one transaction reads is of one moment, as it is on SQLite: a stream that reads what is pending, and
            # then up to where that is so, must not miss what is committed in between.
            connection.execute(READ_ONE_MOMENT)
        connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def _take_right(connection: Connection) -> None:
    for statement in SERVER_KEEPALIVES:
        connection.execute(statement)
    connection.execute(f"SET LOCAL lock_timeout = '{RIGHT_TIMEOUT}'")
    try:
        connection.execute("SELECT pg_advisory_lock(%s)", [RIGHT_TO_WRITE])
    except psycopg.errors.LockNotAvailable:
        raise DatabaseTaken("another connection has the right to write to this database") from None
