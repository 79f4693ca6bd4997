"""Checks that the files that SQLite has open are still those at their paths.

SQLite keeps writing to a deleted file without an error, so everything acknowledged after the deletion would be lost.
"""

from __future__ import annotations

import os
from pathlib import Path

from ccm.errors import DatabaseDamaged, StorageDown

# The database, its write-ahead log, and the log's shared index.
SUFFIXES = ("", "-wal", "-shm")

Identity = tuple[int, int] | None
OpenFiles = tuple[Identity, ...]


class FileWatch:
    """The files of one database, shared by all its connections. A check takes a few microseconds."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._first: Identity = None
        # Set when SQLite has found damage, because further writes could only make it worse.
        self.damage: str | None = None

    def opened(self) -> OpenFiles:
        """Return the files that a new connection has just opened.

        Raises:
            StorageDown: the database is not the file that was opened first.
        """
        identities = tuple(_identity(self._path + suffix) for suffix in SUFFIXES)
        self._first = self._first or identities[0]
        self.check_path()
        return identities

    def check_path(self) -> None:
        """Check the path before a connection is opened, because SQLite would create a missing file.

        Raises:
            StorageDown: the file that was opened first is gone.
        """
        if self._first is not None and _identity(self._path) != self._first:
            raise self._gone("")

    def check(self, opened: OpenFiles) -> None:
        """Check the files of a connection.

        Args:
            opened: the result of `opened` for that connection.

        Raises:
            StorageDown: one of them is gone.
        """
        for suffix, identity in zip(SUFFIXES, opened, strict=True):
            if _identity(self._path + suffix) != identity:
                raise self._gone(suffix)

    def check_damage(self) -> None:
        """Check that no damage has been found.

        Raises:
            DatabaseDamaged: damage has been found.
        """
        if self.damage is not None:
            raise DatabaseDamaged(f"damage was found before: {self.damage}")

    def _gone(self, suffix: str) -> StorageDown:
        subject = "the database file" if not suffix else f"the database's {suffix} file"
        return StorageDown(
            f"{Path(self._path + suffix)} has been removed or replaced; put the original back, or stop the service",
            f"{subject} has been removed or replaced",
        )


def _identity(path: str) -> Identity:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
