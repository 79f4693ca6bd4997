"""Opens the file of an import, and detects its format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from ccm.core.archive.bun.database import BunDatabase
from ccm.core.archive.bun.source import BunSource
from ccm.core.archive.lines import LineSource
from ccm.core.archive.records import SourceError
from ccm.db.driver.sqlite_file import MAGIC

# A source of runs, in which each run follows its parent and the earlier runs of its session.
Source = LineSource | BunSource


@contextmanager
def open_source(path: str, warn: Callable[[str], None]) -> Iterator[Source]:
    """Open an export or a database of the original service.

    Args:
        path: the file; `-` for an export on standard input.
        warn: called with a sentence for each thing that is not imported unchanged.

    Raises:
        CommandRefused: the file has neither format.
    """
    if path == "-":
        yield LineSource(sys.stdin.buffer, "The standard input")
        return
    with _open(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            file.seek(0)
            yield LineSource(file, path)
            return
    with closing(BunDatabase(Path(path))) as database:
        yield BunSource(database, warn)


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from None
