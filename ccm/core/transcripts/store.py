"""Claude Code's transcripts in the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

from ccm.core.storage.writer import Writer
from ccm.db import transcripts
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.errors import StorageRejected

T = TypeVar("T")

# Entries that are read at a time; one may have some 100 KB.
CHUNK_ENTRIES = 200


def extend(transaction: Transaction, key: TranscriptKey, length: int, entries: Sequence[Entry]) -> int:
    """Append entries to a transcript of `length` entries, none of which it has. Returns its new length.

    Raises:
        StorageRejected: the transcript has fewer entries.
    """
    before = transcripts.length(transaction, key)
    if before < length:
        raise StorageRejected("the entries before these were not stored")
    if before == length:  # else the previous attempt was committed after all
        transcripts.extend(transaction, key, length, entries)
    return length + len(entries)


def merge(transaction: Transaction, key: TranscriptKey, entries: Sequence[Entry]) -> int:
    """Merge all entries of a file into its transcript, of which a part may be stored. Returns its new length.

    A file that contains every stored entry replaces the stored transcript. From any other file only new entries are
    appended, because the file may be truncated.
    """
    has_all = {entry.uuid for entry in entries}.issuperset(transcripts.uuids(transaction, key))
    (transcripts.replace if has_all else transcripts.append)(transaction, key, entries)
    return transcripts.length(transaction, key)


class TranscriptStore:
    """Stores transcripts and reads them back."""

    def __init__(self, writer: Writer, database: Database) -> None:
        self._writer = writer
        self._database = database

    def submit(self, write: Callable[[Transaction], T]) -> Future[T]:
        """Queue a write. The future completes when it is committed.

        Raises:
            ShuttingDown: nothing is stored.
        """
        return self._writer.submit(write).future

    def texts(self, key: TranscriptKey) -> Iterator[str]:
        """Yield the JSON texts of a transcript's entries, in order. They are read in chunks.

        Raises:
            StorageError: the database cannot be read.
        """
        after = -1
        while found := self._read(partial(transcripts.texts, key=key, after=after, through=after + CHUNK_ENTRIES)):
            yield from found
            after += len(found)

    def of_session(self, sdk_session_id: str) -> list[TranscriptKey]:
        """Return the keys of the stored transcripts of an SDK session, the main one first.

        Raises:
            StorageError: the database cannot be read.
        """
        return list(self._read(lambda transaction: transcripts.of_session(transaction, sdk_session_id)))

    def uuids(self, key: TranscriptKey) -> list[str]:
        """Return the uuids of a transcript's entries, in order.

        Raises:
            StorageError: the database cannot be read.
        """
        return self._read(lambda transaction: transcripts.uuids(transaction, key))

    def _read(self, query: Callable[[Transaction], T]) -> T:
        with self._database.transaction() as transaction:
            return query(transaction)
