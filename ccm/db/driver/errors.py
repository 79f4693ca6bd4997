"""Translates the drivers' exceptions: which class of `ccm.errors`, and a summary that is safe to show to clients."""

from __future__ import annotations

import sqlite3
import sys
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ccm.errors import DatabaseDamaged, StorageDown, StorageError, StorageRejected

if TYPE_CHECKING:
    import psycopg

# SQLite's codes for a faulty statement. All other codes mean a fault of the storage.
SQLITE_STATEMENT_ERRORS = frozenset(
    {
        sqlite3.SQLITE_ERROR,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_MISUSE,
        sqlite3.SQLITE_RANGE,
    }
)
SQLITE_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
LOCKED = "another program has locked the database"
FULL = "the disk of the database is full"
READ_ONLY = "the database is read-only"
SQLITE_SUMMARIES = {
    sqlite3.SQLITE_BUSY: LOCKED,
    sqlite3.SQLITE_LOCKED: LOCKED,
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_READONLY: READ_ONLY,
    sqlite3.SQLITE_PERM: READ_ONLY,
    sqlite3.SQLITE_IOERR: "the disk of the database fails, or has become read-only",
    sqlite3.SQLITE_CANTOPEN: "the database file cannot be opened",
    sqlite3.SQLITE_INTERRUPT: "the database takes too long",
}

# PostgreSQL's SQLSTATEs.
# A class that psycopg treats as a fault of the server although the row is to blame (too large for an index, say).
PROGRAM_LIMIT_EXCEEDED = "54"
# A standby, or a server made read-only because its disk is full.
READ_ONLY_TRANSACTION = "25006"
SERVER_GONE = "the database server cannot be reached"
POSTGRESQL_SUMMARIES = {
    READ_ONLY_TRANSACTION: READ_ONLY,
    "53100": FULL,
    "53300": "the database server has no connection free",
    "55P03": LOCKED,
    "57014": "the database server takes too long",
    "57P01": SERVER_GONE,
    "57P02": SERVER_GONE,
    "57P03": SERVER_GONE,
    "28000": "the database server refuses the login",
    "28P01": "the database server refuses the login",
    "3D000": "the database does not exist",
}
# Damaged pages.
POSTGRESQL_DAMAGE = ("XX001", "XX002")


def storage_error(error: BaseException) -> StorageError | None:
    """Translate an exception of a driver, wrapped by SQLAlchemy or not. Return None if it comes from no driver."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, UnicodeError | OverflowError):
        return StorageRejected(f"a value cannot be stored: {type(error).__name__}")
    if isinstance(error, PoolTimeout):
        return StorageDown("all connections are in use", "all connections to the database are in use")
    cause = getattr(error, "orig", None) or error
    reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
    if isinstance(cause, sqlite3.Error):
        return _from_sqlite(cause, reason)
    psycopg = sys.modules.get("psycopg")  # not imported here, because SQLite does not need it
    if psycopg is not None and isinstance(cause, psycopg.Error):
        return _from_postgresql(cause, reason)
    return StorageRejected(reason) if isinstance(error, SQLAlchemyError) else None


def _from_sqlite(cause: sqlite3.Error, reason: str) -> StorageError:
    code = getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
    if code in SQLITE_STATEMENT_ERRORS:
        return StorageRejected(reason)
    if code in SQLITE_DAMAGE:
        return DatabaseDamaged(reason)
    return StorageDown(reason, SQLITE_SUMMARIES.get(code))


def _from_postgresql(cause: psycopg.Error, reason: str) -> StorageError:
    import psycopg  # noqa: PLC0415

    from ccm.db.driver.postgresql import NoAnswer  # noqa: PLC0415

    if isinstance(cause, NoAnswer):
        return StorageDown(reason, "the database server does not answer")
    state = cause.sqlstate or ""
    if state in POSTGRESQL_DAMAGE:
        return DatabaseDamaged(reason)
    down = isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError) or state == READ_ONLY_TRANSACTION
    if not down or state.startswith(PROGRAM_LIMIT_EXCEEDED):
        return StorageRejected(reason)
    # Without a SQLSTATE the client side raised it: there is no connection, or it was lost.
    return StorageDown(reason, POSTGRESQL_SUMMARIES.get(state, None if state else SERVER_GONE))
