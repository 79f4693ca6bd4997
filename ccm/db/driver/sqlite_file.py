"""The SQLite file before it is opened: is it ours, and is it its owner's alone?

Looking into another program's file through SQLite would already change it (its journal mode), so the file's header is
read instead: https://www.sqlite.org/fileformat.html#the_database_header
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from ccm.errors import DatabaseRefused

MAGIC = b"SQLite format 3\0"
APPLICATION_ID = int.from_bytes(b"ccm1")
APPLICATION_ID_AT = slice(68, 72)
HEADER_SIZE = 100
ADVICE = "Restore a backup, or save what can be saved with sqlite3's .recover into a new file."
# How long a start may look for damage, and wait for another program to let it look.
CHECK_TIMEOUT = 5.0
LOCK_TIMEOUT = 10.0
# How often it looks at the time: after so many steps of SQLite's machine.
CHECK_STEPS = 1_000


def make_private(path: Path) -> None:
    """Make sure that a file is there and is its owner's alone, whatever the umask: runs hold secrets."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    path.chmod(0o600)


def prepare(url: str) -> None:
    """Make the file of a database if it is not there. Any other database is left to its server.

    Raises:
        DatabaseRefused: it cannot be written, or is not ours; then it is untouched.
    """
    if not url.startswith("sqlite"):
        return
    path = _path(url)
    try:
        _check_links(path)
        header = _header(path)
        if header:
            _check_header(path, header)
        elif _size(_log_of(path)):
            # SQLite would take it for a new database, and throw the log away with all that is in it.
            raise DatabaseRefused(f"{path} is damaged: it is empty, and its write-ahead log is not. {ADVICE}")
        make_private(path)
        if not header:
            _mark(path)
    except OSError as error:
        raise DatabaseRefused(f"The SQLite file {path} cannot be written: {error.strerror}.") from None
    except sqlite3.Error as error:
        raise DatabaseRefused(f"The SQLite file {path} cannot be written: {error}.") from None


def check(url: str) -> bool:
    """Look for damage in the pages of a SQLite file, for CHECK_TIMEOUT. False if there was more to look at.

    Raises:
        DatabaseRefused: it is damaged, or cannot be read; it is untouched.
    """
    if not url.startswith("sqlite"):
        return True
    path = _path(url)
    # Read-only, or closing it would write what is in the log into the file. Without a log there is no need to make one.
    how = "mode=ro" if _size(_log_of(path)) else "immutable=1"
    deadline = time.monotonic() + CHECK_TIMEOUT
    try:
        with closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, timeout=LOCK_TIMEOUT)
        ) as connection:
            connection.set_progress_handler(lambda: int(time.monotonic() > deadline), CHECK_STEPS)
            found = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            return False
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise DatabaseRefused(f"{path} is damaged: {error}. {ADVICE}") from None
        raise DatabaseRefused(f"{path} cannot be read: {error}.") from None
    if found != ["ok"]:
        raise DatabaseRefused(f"{path} is damaged: {' '.join(str(found[0]).split())}. {ADVICE}")
    return True


def _path(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def _log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _size(path: Path) -> int:
    """Bytes; 0 if there is no such file."""
    return path.stat().st_size if path.exists() else 0


def _header(path: Path) -> bytes:
    """The header; empty if there is no file or nothing in it."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.read(HEADER_SIZE)


def _check_links(path: Path) -> None:
    """The lock and the write-ahead log go by the file's name. Under a second name they would be others: two services
    could write at once, and what is still in the log would be lost. https://www.sqlite.org/howtocorrupt.html
    """
    names = path.stat().st_nlink if path.exists() else 1
    if names > 1:
        raise DatabaseRefused(
            f"{path} has {names} names (hard links); SQLite's log goes by the name, so there may be only one. "
            f"`find / -xdev -samefile {shlex.quote(str(path))}` shows them. Stop a CC Manager that uses another, then "
            "remove all but one; if one has a -wal file beside it, keep that one."
        )


def _check_header(path: Path, header: bytes) -> None:
    if not header.startswith(MAGIC):
        raise DatabaseRefused(f"{path} is no SQLite file; give DATABASE_PATH a file of its own.")
    if int.from_bytes(header[APPLICATION_ID_AT]) != APPLICATION_ID:
        raise DatabaseRefused(f"{path} is another program's SQLite file; give DATABASE_PATH a file of its own.")


def _mark(path: Path) -> None:
    """Write the mark into the file itself, before anything is in a write-ahead log."""
    connection = sqlite3.connect(path)
    try:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    finally:
        connection.close()
