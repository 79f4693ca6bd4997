"""A connection to SQLite with a time limit for statements."""

from __future__ import annotations

import math
import sqlite3
import time
from typing import Any

# How long SQLite itself waits for a lock (ms). The writer then retries, so that a write given up meanwhile is dropped.
BUSY_TIMEOUT_MS = 1_000
# How many steps of SQLite's virtual machine pass between checks of the time limit.
CHECK_STEPS = 1_000


class Cursor(sqlite3.Cursor):
    """A cursor that restarts the time limit with each statement, as PostgreSQL's statement_timeout does."""

    connection: Connection

    def execute(self, sql: str, parameters: Any = ()) -> Cursor:
        self.connection.deadline = time.monotonic() + self.connection.statement_seconds
        super().execute(sql, parameters)
        return self


class Connection(sqlite3.Connection):
    """A connection whose statements have no time limit until `limit_statements` is called."""

    statement_seconds = math.inf
    deadline = math.inf

    def limit_statements(self, seconds: float) -> None:
        """Interrupt statements that take longer: they raise sqlite3.OperationalError with SQLITE_INTERRUPT."""
        self.statement_seconds = seconds
        self.set_progress_handler(lambda: int(time.monotonic() > self.deadline), CHECK_STEPS)

    def cursor(self, factory: Any = Cursor) -> Any:
        return super().cursor(factory)


def pragmas(*, service: bool) -> list[str]:
    """Return the statements that configure a new connection.

    Args:
        service: the connection belongs to a service. A command's temporary files may be too large for memory.
    """
    statements = [
        f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
        "PRAGMA foreign_keys = ON",
        "PRAGMA synchronous = FULL",
    ]
    if service:
        # Even a savepoint may need a temporary file, and agents can fill the directory for temporary files.
        statements.append("PRAGMA temp_store = MEMORY")
    return statements
