"""What an import is given, told apart by its content."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO

from ccm.core.archive.bun.source import BunSource
from ccm.core.archive.lines import LineSource
from ccm.core.archive.records import Source, SourceError
from ccm.db.driver.sqlite_file import MAGIC


@contextmanager
def open_source(path: str, has_transcript: Callable[[str, str], bool], tell: Callable[[str], None]) -> Iterator[Source]:
    """
    Args:
        path: of an export or of a Bun database; `-` for an export on standard input.
        has_transcript: whether Claude Code has a run's transcript on this host, by the run's cwd and SDK session.
        tell: called with a sentence about whatever does not come in just as it was.

    Raises:
        CommandRefused: it is neither; names it.
    """
    if path == "-":
        yield LineSource(sys.stdin.buffer, "The standard input")
        return
    with _open(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            file.seek(0)
            yield LineSource(file, path)
            return
    with closing(BunSource(Path(path), has_transcript, tell)) as source:
        yield source


def _open(path: str) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from None
