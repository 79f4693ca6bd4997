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
    """Stores transcripts and reads them back. `claude_agent_sdk.SessionStore` says what `append` owes to the SDK."""

    def __init__(self, writer: Writer, database: Database) -> None:
        self._writer = writer
        self._database = database

    async def append(self, key: Mapping[str, str], entries: Sequence[Mapping[str, Any]]) -> None:
        """
        Raises:
            TimeoutError: it is not stored yet, and may be later.
            CCMError, StorageError: it is not stored.
        """
        if not entries:
            return
        place = TranscriptKey(key["session_id"], key["project_key"], key.get("subpath") or "")
        rows = [entry(line) for line in entries]
        length: list[int] = []

        def work(transaction: Transaction) -> None:
            before = transcripts.length(transaction, place)
            if length and before > length[0]:
                return  # the commit before this try, whose outcome was not known, had gone through after all
            length[:] = [before]
            transcripts.append(transaction, place, rows)

        write = self._writer.submit(work)
        try:
            await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(write.future)), WRITE_TIMEOUT)
        except TimeoutError:
            # The SDK tells it as the reason that it gives.
            late = TimeoutError(f"the database has not taken it in {WRITE_TIMEOUT:.0f} seconds")
            write.give_up(late)
            raise late from None

    def texts(self, key: TranscriptKey) -> Iterator[str]:
        """The JSON texts of a transcript's entries, in order, read some at a time.

        Raises:
            StorageError: the database cannot be read.
        """
        after = -1
        while found := self._read(partial(transcripts.texts, key=key, after=after, through=after + CHUNK_ENTRIES)):
            yield from found
            after += len(found)

    def of_session(self, sdk_session_id: str) -> list[TranscriptKey]:
        """The transcripts that are stored of an SDK session, the main one first.

        Raises:
            StorageError: the database cannot be read.
        """
        return list(self._read(lambda transaction: transcripts.of_session(transaction, sdk_session_id)))

    def uuids(self, key: TranscriptKey) -> list[str]:
        """The uuids of a transcript's entries, in order.

        Raises:
            StorageError: the database cannot be read.
        """
        return self._read(lambda transaction: transcripts.uuids(transaction, key))

    def merge(self, files: Mapping[TranscriptKey, Sequence[Entry]]) -> None:
        """Store what files hold. A file that has all that is stored of it takes its place; of any other, what is new
        is added: it may be a stump. Returns when it is committed, however long that takes.

        Raises:
            CCMError, StorageError: it is not stored.
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
    """What a run gets as its session store: it takes everything in and gives nothing out.

    A session that the SDK loaded from a store would be resumed in a temporary configuration directory, which has none
    of the user's settings and is deleted with the only copy of the new transcript in it. With nothing to load, Claude
    Code works on its own files, and this is a second copy.
    """

    def __init__(self, store: TranscriptStore, sdk_session_id: str) -> None:
        self._store = store
        self._sdk_session_id = sdk_session_id
        self._begun = False
        self._failed = False
        # How many entries are being stored: Claude Code's output stands still meanwhile.
        self._under_way = 0

    @property
    def busy(self) -> bool:
        """Whether something is on its way to storage."""
        return self._under_way > 0

    @property
    def failed(self) -> bool:
        """Whether something could not be stored, or not in time."""
        return self._failed

    @property
    def whole(self) -> bool:
        """Whether the main transcript has arrived, and nothing has failed."""
        return self._begun and not self._failed

    async def append(self, key: Mapping[str, str], entries: Sequence[Mapping[str, Any]]) -> None:
        self._under_way += 1
        try:
            await self._store.append(key, entries)
        except BaseException:
            self._failed = True
            raise
        finally:
            self._under_way -= 1
        self._begun = self._begun or (key["session_id"] == self._sdk_session_id and not key.get("subpath"))

    async def load(self, _key: Mapping[str, str]) -> list[dict[str, Any]] | None:
        """Nothing, ever."""
        return None
