"""Claude Code's transcripts in the database, and the SDK's `SessionStore` that a run gets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from ccm.core.storage.writer import WRITE_TIMEOUT, Writer
from ccm.db import transcripts
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import Entry, TranscriptKey
from ccm.json_text import to_json_text

T = TypeVar("T")

# Entries that are read at a time; one may have some 100 KB.
CHUNK_ENTRIES = 200


def entry(line: Mapping[str, Any]) -> Entry:
    """A line of a transcript as it is stored."""
    uuid = line.get("uuid")
    return Entry(uuid if isinstance(uuid, str) and uuid.isascii() and uuid.isprintable() else None, to_json_text(line))


class TranscriptStore:
    """Stores transcripts and reads them back. The contract of `append` is that of `claude_agent_sdk.SessionStore`."""

    def __init__(self, writer: Writer, database: Database) -> None:
        self._writer = writer
        self._database = database

    async def append(self, key: Mapping[str, str], entries: Sequence[Mapping[str, Any]]) -> None:
        """Append entries to a transcript, and wait until they are committed.

        Raises:
            TimeoutError: the entries are not stored yet, and may be later.
            CCMError, StorageError: the entries are not stored.
        """
        if not entries:
            return
        place = TranscriptKey(key["session_id"], key["project_key"], key.get("subpath") or "")
        rows = [entry(line) for line in entries]
        length: list[int] = []

        def work(transaction: Transaction) -> None:
            before = transcripts.length(transaction, place)
            if length and before > length[0]:
                return  # the previous attempt was committed after all
            length[:] = [before]
            transcripts.append(transaction, place, rows)

        write = self._writer.submit(work)
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(write.future)), WRITE_TIMEOUT)
        except TimeoutError:
            # The SDK reports this message as the reason.
            late = TimeoutError(f"the entries were not stored within {WRITE_TIMEOUT:.0f} seconds")
            write.give_up(late)
            raise late from None

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

    def merge(self, files: Mapping[TranscriptKey, Sequence[Entry]]) -> None:
        """Merge transcript files into the database, and wait until that is committed.

        A file that contains every stored entry replaces the stored transcript. From any other file only new entries are
        appended, because the file may be truncated.

        Raises:
            CCMError, StorageError: nothing is stored.
        """

        def work(transaction: Transaction) -> None:
            for key, entries in files.items():
                has_all = {entry.uuid for entry in entries}.issuperset(transcripts.uuids(transaction, key))
                (transcripts.replace if has_all else transcripts.append)(transaction, key, entries)

        self._writer.submit(work).future.result()

    def _read(self, query: Callable[[Transaction], T]) -> T:
        with self._database.transaction() as transaction:
            return query(transaction)


class Mirror:
    """A run's session store, which stores every entry and never loads any.

    The SDK resumes a session that it has loaded from a store in a temporary configuration directory. That directory has
    none of the user's settings, and is deleted with the only copy of the new transcript. If nothing can be loaded,
    Claude Code works on its own files, and the store holds a second copy.
    """

    def __init__(self, store: TranscriptStore, sdk_session_id: str) -> None:
        self._store = store
        self._sdk_session_id = sdk_session_id
        self._begun = False
        # Whether entries could not be stored, or not in time.
        self.failed = False
        # The number of appends in progress. The SDK reads nothing from Claude Code meanwhile.
        self._appending = 0

    @property
    def busy(self) -> bool:
        """Whether entries are being stored."""
        return self._appending > 0

    @property
    def whole(self) -> bool:
        """Whether entries of the main transcript were stored, and no append failed."""
        return self._begun and not self.failed

    async def append(self, key: Mapping[str, str], entries: Sequence[Mapping[str, Any]]) -> None:
        self._appending += 1
        try:
            await self._store.append(key, entries)
        except BaseException:
            self.failed = True
            raise
        finally:
            self._appending -= 1
        self._begun = self._begun or (key["session_id"] == self._sdk_session_id and not key.get("subpath"))

    async def load(self, _key: Mapping[str, str]) -> list[dict[str, Any]] | None:
        """Return None: nothing is ever loaded."""
        return None
