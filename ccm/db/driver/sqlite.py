"""A connection to SQLite that knows PostgreSQL's functions and gives up a statement that takes too long."""

from __future__ import annotations

import math
import sqlite3
import time
from typing import Any

# How long SQLite itself waits for a lock. The writer tries again after that, so that a cancelled write is let go.
BUSY_TIMEOUT_MS = 1_000
# How often a statement looks at the time: after so many steps of SQLite's machine.
CHECK_STEPS = 1_000


class Cursor(sqlite3.Cursor):
    """Each statement has its time, as under PostgreSQL's statement_timeout."""

    connection: Connection

    def execute(self, sql: str, parameters: Any = ()) -> Cursor:
        self.connection.deadline = time.monotonic() + self.connection.statement_seconds
        super().execute(sql, parameters)
        return self


class Connection(sqlite3.Connection):
    """Its statements take as long as they take, unless `limit_statements` has been called."""

    statement_seconds = math.inf
    deadline = math.inf

    def __init__(self, *words: Any, **parameters: Any) -> None:
        super().__init__(*words, **parameters)
        # SQLite's own knows ASCII only, and a search should find École in either case.
        self.create_function("LOWER", 1, lambda text: None if text is None else str(text).lower(), deterministic=True)
        # SQLite's own, INSTR, takes the product of both lengths for a text that nearly matches everywhere.
        self.create_function("STRPOS", 2, _position, deterministic=True)

    def limit_statements(self, seconds: float) -> None:
        """Interrupt a statement that takes longer. It raises sqlite3.OperationalError, SQLITE_INTERRUPT."""
        self.statement_seconds = seconds
        self.set_progress_handler(lambda: int(time.monotonic() > self.deadline), CHECK_STEPS)

    def cursor(self, factory: Any = Cursor) -> Any:
        return super().cursor(factory)


def pragmas(*, service: bool) -> list[str]:
    """Return the settings of a new connection.

    Args:
        service: it is one of a service, and not of a command that needs room for large temporary files.
    """
    statements = [
        f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
        "PRAGMA foreign_keys = ON",
        "PRAGMA synchronous = FULL",
    ]
    if service:
        # Even a savepoint may need a temporary file, and agents can fill the directory of such files.
        statements.append("PRAGMA temp_store = MEMORY")
    return statements


def _position(text: str | None, part: str) -> int | None:
    """Where a text first has a part, counted from 1; 0 if it has not."""
    return None if text is None else text.find(part) + 1
