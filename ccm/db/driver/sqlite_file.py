"""Checks of the SQLite file before it is opened: is it ours, intact, and private to its owner?

Opening another program's file with SQLite would already change it (its journal mode). So the header is read instead:
https://www.sqlite.org/fileformat.html#the_database_header
"""

from __future__ import annotations

import os
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path

from ccm.db.driver import sqlite
from ccm.db.driver.errors import SQLITE_DAMAGE
from ccm.errors import DatabaseRefused

MAGIC = b"SQLite format 3\0"
APPLICATION_ID = int.from_bytes(b"ccm1")
APPLICATION_ID_AT = slice(68, 72)
HEADER_SIZE = 100
ADVICE = "Restore a backup, or recover the readable data into a new file with sqlite3's .recover."
# How long a start looks for damage, and how long it waits for another program's lock (seconds).
CHECK_TIMEOUT = 5.0
LOCK_TIMEOUT = 10.0


def sqlite_file_path(url: str) -> Path | None:
    """Return the path of a SQLite database's file; None for PostgreSQL, which has no such file."""
    return Path(url.removeprefix("sqlite:///")) if url.startswith("sqlite") else None


def make_private(path: Path) -> None:
    """Create a file if needed, and restrict it to its owner whatever the umask is, because runs contain secrets."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)


def prepare(url: str) -> None:
    """Create the file of a SQLite database if it does not exist. Do nothing for PostgreSQL.

    Raises:
        DatabaseRefused: the file cannot be written, or is not ours. It is left unchanged.
    """
    path = sqlite_file_path(url)
    if path is None:
        return
    try:
        _check_links(path)
        header = _header(path)
        if header:
            _check_header(path, header)
        elif _size(_log_of(path)):
            # SQLite would treat it as a new database and discard the log with all its data.
            raise DatabaseRefused(f"{path} is damaged: it is empty, and its write-ahead log is not. {ADVICE}")
        make_private(path)
        if not header:
            # Mark it as ours before anything is in a write-ahead log.
            with closing(sqlite3.connect(path)) as connection:
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DatabaseRefused(f"The SQLite file {path} cannot be written: {reason}.") from None


def check(url: str) -> bool:
    """Look for damage in the pages of a SQLite file, for CHECK_TIMEOUT at most.

    Returns: False if the time was too short to check the whole file.

    Raises:
        DatabaseRefused: the file is damaged or cannot be read. It is left unchanged.
    """
    path = sqlite_file_path(url)
    if path is None:
        return True
    # Read-only, because closing it would otherwise write the log into the file. If there is no log, do not create one.
    mode = "mode=ro" if _size(_log_of(path)) else "immutable=1"
    uri = f"{path.absolute().as_uri()}?{mode}"
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=LOCK_TIMEOUT, factory=sqlite.Connection)) as connection:
            connection.limit_statements(CHECK_TIMEOUT)
            findings = [row[0] for row in connection.cursor().execute("PRAGMA quick_check(1)")]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            return False
        if error.sqlite_errorcode & 0xFF in SQLITE_DAMAGE:
            raise DatabaseRefused(f"{path} is damaged: {error}. {ADVICE}") from None
        raise DatabaseRefused(f"{path} cannot be read: {error}.") from None
    if findings != ["ok"]:
        raise DatabaseRefused(f"{path} is damaged: {' '.join(str(findings[0]).split())}. {ADVICE}")
    return True


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _size(path: Path) -> int:
    """Return the size in bytes; 0 if there is no such file."""
    return path.stat().st_size if path.exists() else 0


def _header(path: Path) -> bytes:
    """Return the header; empty if the file is missing or empty."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.read(HEADER_SIZE)


def _check_links(path: Path) -> None:
    """Refuse a file with several hard links.

    The lock and the write-ahead log belong to the file's name. Under a second name, two services could write at once,
    and data that is still in the log would be lost: https://www.sqlite.org/howtocorrupt.html
    """
    names = path.stat().st_nlink if path.exists() else 1
    if names > 1:
        raise DatabaseRefused(
            f"{path} has {names} names (hard links); SQLite's log belongs to one name, so there may be only one. "
            f"`find / -xdev -samefile {shlex.quote(str(path))}` lists them. Stop any CC Manager that uses another, "
            "then remove all names but one; if one has a -wal file beside it, keep that one."
        )


def _check_header(path: Path, header: bytes) -> None:
    if not header.startswith(MAGIC):
        raise DatabaseRefused(f"{path} is not a SQLite file; give DATABASE_PATH a file of its own.")
    if int.from_bytes(header[APPLICATION_ID_AT]) != APPLICATION_ID:
        raise DatabaseRefused(f"{path} is another program's SQLite file; give DATABASE_PATH a file of its own.")
