"""Writes sessions as JSON Lines: one object per line, with JSON texts copied as they are stored.

The order suits an import: each session follows the one it was forked from, each run its session, and a run's messages,
approvals and transcripts follow the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ccm.db import approvals, archive, messages, runs, sessions, transcripts
from ccm.db.driver.transaction import Transaction
from ccm.json_text import to_json_text
from ccm.models import Run, Session
from ccm.models.shape import Archive
from ccm.models.stored import StoredModel
from ccm.timestamps import timestamp

FORMAT = "cc-manager"
VERSION = 1
# Limits of one read, which bound the memory of an export.
PAGE = 1_000
CHUNK_ITEMS = 500
CHUNK_BYTES = 2 * 2**20
# Approvals per read: each may hold the whole content of a file to write.
APPROVALS_PAGE = 20
BEFORE_ALL = -(2**62)


def export(transaction: Transaction, session_id: str | None) -> Iterator[str]:
    """Yield the lines of an export.

    Args:
        transaction: a snapshot of the database.
        session_id: the id of a session, or the SDK session id of one of its runs. Only this session and its ancestors
            are exported; None exports all sessions.

    Raises:
        SessionNotFound: there is no such session.
    """
    chosen = None if session_id is None else _with_ancestors(transaction, session_id)
    last_seq = runs.next_seq(transaction) - 1
    yield _line(type="export", format=FORMAT, version=VERSION, exportedAt=timestamp(), lastSeq=last_seq)
    session_count = run_count = 0
    for session in _all_sessions(transaction) if chosen is None else chosen:
        session_count += 1
        yield _line(type="session", **archived(session))
        for link in runs.links(transaction, session.id):
            run = runs.get(transaction, link.id)
            run_count += 1
            yield _line(type="run", **archived(run))
            yield from _messages(transaction, run)
            yield from _approvals(transaction, run)
            yield from _transcripts(transaction, run)
    yield _line(type="end", sessions=session_count, runs=run_count)


def _with_ancestors(transaction: Transaction, session_id: str) -> list[Session]:
    """Return a session and the sessions it was forked from, the oldest first."""
    session: Session | None = sessions.get(transaction, session_id)
    lineage: list[Session] = []
    while session is not None:
        lineage.insert(0, session)
        parent = session.parent_session_id
        session = None if parent is None else sessions.find(transaction, parent)
    return lineage


def _all_sessions(transaction: Transaction) -> Iterator[Session]:
    after = BEFORE_ALL
    while found := archive.sessions_beyond(transaction, after, PAGE):
        for _, session_id in found:
            yield sessions.get(transaction, session_id)
        after = found[-1][0]


def _line(**fields: Any) -> str:
    return to_json_text(fields) + "\n"


def archived(resource: StoredModel) -> dict[str, Any]:
    """Return the fields of a resource's line: those that the API shows, and the hidden columns that an import needs."""
    shown = resource.to_json()
    exported = [field for field in resource.shape.fields if field.archive is not Archive.LEFT_OUT]
    visible = {field.shown: shown[field.shown] for field in exported if field.shown is not None}
    hidden = {field.column: getattr(resource, field.name) for field in exported if field.shown is None}
    return {str(name): value for name, value in (visible | hidden).items()}


def _messages(transaction: Transaction, run: Run) -> Iterator[str]:
    through = run.message_count - 1
    for after, last in _chunks(lambda after: messages.sizes(transaction, run.id, after, through, CHUNK_ITEMS)):
        for index, created_at, text in archive.dated_texts(transaction, run.id, after, last):
            # Not parsed: the stored text is copied unchanged, and there may be millions.
            fields = to_json_text({"type": "message", "runId": run.id, "index": index, "createdAt": created_at})
            yield f'{fields[:-1]},"message":{text}}}\n'


def _approvals(transaction: Transaction, run: Run) -> Iterator[str]:
    after = None
    while found := approvals.page(transaction, {"runId": run.id}, limit=APPROVALS_PAGE, after=after):
        for approval in found:
            yield _line(type="approval", **archived(approval))
        after = found[-1].seq


def _transcripts(transaction: Transaction, run: Run) -> Iterator[str]:
    for key, updated_at_ms in transcripts.of_session(transaction, run.sdk_session_id).items():
        place = {"sdkSessionId": run.sdk_session_id, "projectKey": key.project_key, "subpath": key.subpath}
        for after, last in _chunks(partial(transcripts.sizes, transaction, key, limit=CHUNK_ITEMS)):
            entries = transcripts.texts(transaction, key, after, last)
            fields = to_json_text({"type": "transcript", **place, "updatedAtMs": updated_at_ms, "index": after + 1})
            yield f'{fields[:-1]},"entries":[{",".join(entries)}]}}\n'


def _chunks(sizes: Callable[[int], list[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """Yield ranges of indexes, each as (after, through), of about CHUNK_BYTES at most.

    Args:
        sizes: returns (index, bytes) of the next few items after an index.
    """
    after = -1
    while found := sizes(after):
        through, total = after, 0
        for index, size in found:
            total += size
            if total > CHUNK_BYTES and through > after:
                break
            through = index
        yield after, through
        after = through
