"""The tables of the transcripts: ccr_transcripts, ccr_transcript_entries and ccr_transcript_texts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import NamedTuple

from ccm.db.driver.transaction import Transaction

# Replaces the transcript's own session id in a stored text, so that the entries that a fork copies have the same texts
# as the originals. JSON never contains the character itself, only its escape.
OWN_SESSION = "\x01"
DIGEST_BYTES = 16

# The conditions that select the transcript of a TranscriptKey, and its entries.
OF_KEY = '"sdkSessionId" = :sdk_session_id AND "projectKey" = :project_key AND subpath = :subpath'
ENTRIES_OF_KEY = f'"transcriptId" = (SELECT id FROM ccr_transcripts WHERE {OF_KEY})'
TEXTS = "FROM ccr_transcript_entries JOIN ccr_transcript_texts t USING (digest)"


class TranscriptKey(NamedTuple):
    """One transcript file. `subpath` is empty for the main one, `subagents/agent-ID` for a subagent's."""

    sdk_session_id: str
    project_key: str
    subpath: str = ""


class Entry(NamedTuple):
    """One line of a transcript as JSON text in ASCII, and its uuid if it has one."""

    uuid: str | None
    text: str


def is_inside(path: str) -> bool:
    """Return whether a path of a TranscriptKey, which may come from an import, stays below its folder."""
    return "\\" not in path and path.isprintable() and all(part not in ("", ".", "..") for part in path.split("/"))


def append(transaction: Transaction, key: TranscriptKey, entries: Sequence[Entry]) -> None:
    """Append entries, except those whose uuid the transcript has already."""
    transcript = _find_or_insert(transaction, key)
    known: set[str | None] = set(uuids(transaction, key))
    fresh = []
    for entry in entries:
        if entry.uuid is None or entry.uuid not in known:
            fresh.append(entry)
            known.add(entry.uuid)
    insert_at(transaction, transcript, key.sdk_session_id, length(transaction, key), fresh)


def extend(transaction: Transaction, key: TranscriptKey, first: int, entries: Sequence[Entry]) -> None:
    """Insert entries from the index `first` on, without looking for them in the transcript."""
    insert_at(transaction, _find_or_insert(transaction, key), key.sdk_session_id, first, entries)


def replace(transaction: Transaction, key: TranscriptKey, entries: Sequence[Entry]) -> None:
    """Replace all entries of a transcript."""
    transaction.execute(f"DELETE FROM ccr_transcript_entries WHERE {ENTRIES_OF_KEY}", **key._asdict())
    append(transaction, key, entries)


def _find_or_insert(transaction: Transaction, key: TranscriptKey) -> int:
    """Return the id of a transcript, which is about to be written."""
    now = time.time_ns() // 1_000_000
    transcript: int | None = transaction.value(f"SELECT id FROM ccr_transcripts WHERE {OF_KEY}", **key._asdict())
    if transcript is None:
        return insert(transaction, key, now)
    transaction.update("ccr_transcripts", {"updatedAtMs": now}, "id = :id", id=transcript)
    return transcript


def insert_at(
    transaction: Transaction, transcript: int, sdk_session_id: str, first: int, entries: Sequence[Entry]
) -> None:
    """Insert entries from the index `first` on. A text that is stored already is not stored again."""
    texts = [entry.text.replace(sdk_session_id, OWN_SESSION) for entry in entries]
    digests = [hashlib.blake2b(text.encode("ascii"), digest_size=DIGEST_BYTES).hexdigest() for text in texts]
    transaction.insert_many(
        "ccr_transcript_texts", ("digest", "text"), list(zip(digests, texts, strict=True)), known_ignored=True
    )
    rows = [
        (transcript, first + number, entry.uuid, digest)
        for number, (entry, digest) in enumerate(zip(entries, digests, strict=True))
    ]
    transaction.insert_many("ccr_transcript_entries", ("transcriptId", "index", "uuid", "digest"), rows)


def insert(transaction: Transaction, key: TranscriptKey, updated_at_ms: int) -> int:
    """Insert a transcript without entries, and return its id."""
    transcript = int(transaction.value("SELECT COALESCE(MAX(id), 0) + 1 FROM ccr_transcripts"))
    row = {"id": transcript, "sdkSessionId": key.sdk_session_id, "projectKey": key.project_key, "subpath": key.subpath}
    transaction.insert("ccr_transcripts", row | {"updatedAtMs": updated_at_ms})
    return transcript


def length(transaction: Transaction, key: TranscriptKey) -> int:
    """Return how many entries a transcript has; 0 if there is no transcript."""
    sql = f'SELECT COALESCE(MAX("index") + 1, 0) FROM ccr_transcript_entries WHERE {ENTRIES_OF_KEY}'
    return int(transaction.value(sql, **key._asdict()))


def uuids(transaction: Transaction, key: TranscriptKey) -> list[str]:
    """Return the uuids of a transcript's entries, in order."""
    sql = f'SELECT uuid FROM ccr_transcript_entries WHERE uuid IS NOT NULL AND {ENTRIES_OF_KEY} ORDER BY "index"'
    return transaction.column(sql, **key._asdict())


def of_session(transaction: Transaction, sdk_session_id: str) -> dict[TranscriptKey, int]:
    """Return the transcripts of an SDK session, the main one first, with the time of the last write (Unix ms)."""
    sql = (
        'SELECT "sdkSessionId", "projectKey", subpath, "updatedAtMs" FROM ccr_transcripts WHERE "sdkSessionId" = :id '
        'ORDER BY "projectKey", subpath'
    )
    return {TranscriptKey(*key): updated_at_ms for *key, updated_at_ms in transaction.tuples(sql, id=sdk_session_id)}


def sizes(transaction: Transaction, key: TranscriptKey, after: int, limit: int) -> list[tuple[int, int]]:
    """Return index and bytes of the first `limit` entries of a transcript after an index, in order."""
    order = 'ORDER BY "index" LIMIT :limit'
    sql = f'SELECT "index", LENGTH(t.text) {TEXTS} WHERE {ENTRIES_OF_KEY} AND "index" > :after {order}'
    return transaction.tuples(sql, after=after, limit=limit, **key._asdict())


def texts(transaction: Transaction, key: TranscriptKey, after: int, through: int) -> list[str]:
    """Return the texts of a transcript's entries after one index and through another, in order."""
    selected = '"index" > :after AND "index" <= :through ORDER BY "index"'
    sql = f"SELECT t.text {TEXTS} WHERE {ENTRIES_OF_KEY} AND {selected}"
    stored = transaction.column(sql, after=after, through=through, **key._asdict())
    return [text.replace(OWN_SESSION, key.sdk_session_id) for text in stored]
