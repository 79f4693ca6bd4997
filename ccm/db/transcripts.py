"""The tables of the transcripts: ccr_transcripts, ccr_transcript_entries and ccr_transcript_texts."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import NamedTuple

from ccm.db.driver.transaction import Transaction, parameter_list

# Stands for the transcript's own session id in a stored text, so that the entries that a fork copies have the text of
# those they are copies of. JSON never holds the character itself, only its escape.
OWN_SESSION = "\x01"
DIGEST_BYTES = 16
# How many a statement is given at the most: the databases take some 32,000.
PARAMETERS = 1_000

OF_KEY = '"sdkSessionId" = :sdk_session_id AND "projectKey" = :project_key AND subpath = :subpath'


class TranscriptKey(NamedTuple):
    """One file of Claude Code's. `subpath` is empty for the main one, `subagents/agent-ID` for a subagent's."""

    sdk_session_id: str
    project_key: str
    subpath: str = ""


class Entry(NamedTuple):
    """One line of a transcript as JSON text in ASCII, and its uuid if it has one."""

    uuid: str | None
    text: str


def append(transaction: Transaction, key: TranscriptKey, entries: Sequence[Entry]) -> None:
    """Add entries at the end, without those whose uuid is there already."""
    transcript = _of_key(transaction, key)
    fresh = _without_known(transaction, transcript, entries)
    insert_at(transaction, transcript, key.sdk_session_id, _length(transaction, transcript), fresh)


def replace(transaction: Transaction, key: TranscriptKey, entries: Sequence[Entry]) -> None:
    """Have a transcript hold these entries and no others."""
    transcript = _of_key(transaction, key)
    transaction.execute('DELETE FROM ccr_transcript_entries WHERE "transcriptId" = :id', id=transcript)
    append(transaction, key, entries)


def insert_at(
    transaction: Transaction, transcript: int, sdk_session_id: str, first: int, entries: Sequence[Entry]
) -> None:
    """Entries of a transcript from the index `first` on; a text that is there already is not stored again."""
    texts = [_shared(entry.text, sdk_session_id) for entry in entries]
    digests = [_digest(text) for text in texts]
    transaction.insert_many(
        "ccr_transcript_texts", ("digest", "text"), list(zip(digests, texts, strict=True)), known_ignored=True
    )
    rows = [
        (transcript, first + number, entry.uuid, digest)
        for number, (entry, digest) in enumerate(zip(entries, digests, strict=True))
    ]
    transaction.insert_many("ccr_transcript_entries", ("transcriptId", "index", "uuid", "digest"), rows)


def _shared(text: str, sdk_session_id: str) -> str:
    return text.replace(sdk_session_id, OWN_SESSION)


def _own(shared_text: str, sdk_session_id: str) -> str:
    """A stored text as the transcript of a session has it."""
    return shared_text.replace(OWN_SESSION, sdk_session_id)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("ascii"), digest_size=DIGEST_BYTES).hexdigest()


def _of_key(transaction: Transaction, key: TranscriptKey) -> int:
    """The id of a transcript, which is made if it is not there; it is touched either way."""
    now = time.time_ns() // 1_000_000
    transcript = find(transaction, key)
    if transcript is not None:
        transaction.execute('UPDATE ccr_transcripts SET "updatedAtMs" = :now WHERE id = :id', now=now, id=transcript)
        return transcript
    return insert(transaction, key, now)


def insert(transaction: Transaction, key: TranscriptKey, updated_at_ms: int) -> int:
    """A transcript without entries; its id."""
    new = int(transaction.value("SELECT COALESCE(MAX(id), 0) + 1 FROM ccr_transcripts"))
    row = {"id": new, "sdkSessionId": key.sdk_session_id, "projectKey": key.project_key, "subpath": key.subpath}
    transaction.insert("ccr_transcripts", row | {"updatedAtMs": updated_at_ms})
    return new


def _without_known(transaction: Transaction, transcript: int, entries: Sequence[Entry]) -> list[Entry]:
    uuids = [entry.uuid for entry in entries if entry.uuid is not None]
    known: set[str | None] = set()
    for start in range(0, len(uuids), PARAMETERS):
        names, some = parameter_list("uuid", uuids[start : start + PARAMETERS])
        sql = f'SELECT uuid FROM ccr_transcript_entries WHERE "transcriptId" = :transcript AND uuid IN ({names})'
        known.update(transaction.column(sql, transcript=transcript, **some))
    fresh = []
    for entry in entries:
        if entry.uuid is None or entry.uuid not in known:
            fresh.append(entry)
            known.add(entry.uuid)
    return fresh


def _length(transaction: Transaction, transcript: int | None) -> int:
    sql = 'SELECT COALESCE(MAX("index") + 1, 0) FROM ccr_transcript_entries WHERE "transcriptId" = :id'
    return int(transaction.value(sql, id=transcript))


def length(transaction: Transaction, key: TranscriptKey) -> int:
    """How many entries a transcript has; 0 if there is none."""
    return _length(transaction, find(transaction, key))


def uuids(transaction: Transaction, key: TranscriptKey) -> list[str]:
    """The uuids of a transcript's entries, in order."""
    sql = (
        'SELECT uuid FROM ccr_transcript_entries WHERE uuid IS NOT NULL AND "transcriptId" = '
        f'(SELECT id FROM ccr_transcripts WHERE {OF_KEY}) ORDER BY "index"'
    )
    return transaction.column(sql, **key._asdict())


def find(transaction: Transaction, key: TranscriptKey) -> int | None:
    """Return the id of a transcript."""
    found: int | None = transaction.value(f"SELECT id FROM ccr_transcripts WHERE {OF_KEY}", **key._asdict())
    return found


def of_session(transaction: Transaction, sdk_session_id: str) -> dict[TranscriptKey, int]:
    """Return the transcripts of an SDK session, the main one first, and when each was last written (ms since 1970)."""
    sql = (
        'SELECT "sdkSessionId", "projectKey", subpath, "updatedAtMs" FROM ccr_transcripts WHERE "sdkSessionId" = :id '
        'ORDER BY "projectKey", subpath'
    )
    return {TranscriptKey(*key): updated_at_ms for *key, updated_at_ms in transaction.tuples(sql, id=sdk_session_id)}


def sizes(transaction: Transaction, key: TranscriptKey, after: int, limit: int) -> list[tuple[int, int]]:
    """Index and bytes of the first `limit` entries of a transcript after an index, in order."""
    sql = (
        'SELECT e."index", LENGTH(t.text) FROM ccr_transcript_entries e '
        "JOIN ccr_transcript_texts t ON t.digest = e.digest "
        f'WHERE e."transcriptId" = (SELECT id FROM ccr_transcripts WHERE {OF_KEY}) AND e."index" > :after '
        'ORDER BY e."index" LIMIT :limit'
    )
    return [(index, size) for index, size in transaction.tuples(sql, after=after, limit=limit, **key._asdict())]


def texts(transaction: Transaction, key: TranscriptKey, after: int, through: int) -> list[str]:
    """The texts of a transcript's entries after one index and through another, in order."""
    sql = (
        "SELECT t.text FROM ccr_transcript_entries e JOIN ccr_transcript_texts t ON t.digest = e.digest "
        f'WHERE e."transcriptId" = (SELECT id FROM ccr_transcripts WHERE {OF_KEY}) AND e."index" > :after '
        'AND e."index" <= :through ORDER BY e."index"'
    )
    stored = transaction.column(sql, after=after, through=through, **key._asdict())
    return [_own(text, key.sdk_session_id) for text in stored]
