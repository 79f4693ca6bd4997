"""Whether the files that SQLite has open are still those at their paths.

SQLite itself writes on into a file that has been deleted, and says nothing: all that is acknowledged then is lost.
"""

from __future__ import annotations

import os
from pathlib import Path

from ccm.errors import DatabaseDamaged, StorageDown

# The database, its write-ahead log, and what coordinates those who use the two.
SUFFIXES = ("", "-wal", "-shm")

Identity = tuple[int, int] | None
OpenFiles = tuple[Identity, ...]


class FileWatch:
    """One database's files, for all who have them open. Its checks take a few microseconds."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._first: Identity = None
        # Set when SQLite has found damage: what it writes from then on could only make it worse.
        self.damage: str | None = None

    def opened(self) -> OpenFiles:
        """Called with a new connection: which files it has opened.

        Raises:
            StorageDown: not the one that was opened first.
        """
        identities = tuple(_identity(self._path + suffix) for suffix in SUFFIXES)
        if self._first is None:
            self._first = identities[0]
        self.check_path()
        return identities

    def check_path(self) -> None:
        """To be called before a connection is opened: where no file is, SQLite would make one.

        Raises:
            StorageDown: the file that was opened first is not there.
        """
        if self._first is not None and _identity(self._path) != self._first:
            raise self._gone("")

    def check(self, opened: OpenFiles) -> None:
        """
        Args:
            opened: what `opened` gave for a connection.

        Raises:
            StorageDown: a file of that connection is not there.
        """
        for suffix, identity in zip(SUFFIXES, opened, strict=True):
            if _identity(self._path + suffix) != identity:
                raise self._gone(suffix)

    def check_damage(self) -> None:
        """
        Raises:
            DatabaseDamaged: damage has been found.
        """
        if self.damage is not None:
            raise DatabaseDamaged(f"damage was found before: {self.damage}")

    def _gone(self, suffix: str) -> StorageDown:
        what = "the database file" if not suffix else f"the database's {suffix} file"
        return StorageDown(
            f"{Path(self._path + suffix)} has been removed or replaced; put the very file back, or stop the service",
            f"{what} has been removed or replaced",
        )


def _identity(path: str) -> Identity:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
