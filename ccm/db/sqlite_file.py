"""The SQLite file before it is opened: is it ours, and is it its owner's alone?

Looking into another program's file through SQLite would already change it (its journal mode), so the file's header is
read instead: https://www.sqlite.org/fileformat.html#the_database_header
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from ccm.errors import DatabaseRefused

MAGIC = b"SQLite format 3\0"
APPLICATION_ID = int.from_bytes(b"ccm1")
APPLICATION_ID_AT = slice(68, 72)
HEADER_SIZE = 100


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
    path = Path(url.removeprefix("sqlite:///"))
    try:
        header = _header(path)
        if header:
            _check(path, header)
        make_private(path)
        if not header:
            _mark(path)
    except OSError as error:
        raise DatabaseRefused(f"The SQLite file {path} cannot be written: {error.strerror}.") from None
    except sqlite3.Error as error:
        raise DatabaseRefused(f"The SQLite file {path} cannot be written: {error}.") from None


def _header(path: Path) -> bytes:
    """The header; empty if there is no file or nothing in it."""
    if not path.exists():
        return b""
    with path.open("rb") as file:
        return file.read(HEADER_SIZE)


def _check(path: Path, header: bytes) -> None:
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
