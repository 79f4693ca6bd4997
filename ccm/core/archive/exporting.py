"""Sessions as JSON Lines: one object a line, each text as it is stored.

The order is the one that they can be read back in: each session after the one it was forked from, with its runs, and
each run with its messages and transcripts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ccm.db import approvals, archive, messages, runs, sessions, transcripts
from ccm.db.driver.transaction import Transaction
from ccm.db.transcripts import TranscriptKey
from ccm.json_text import to_json_text
from ccm.models import Run, Session
from ccm.models.shape import Archive
from ccm.models.stored import StoredModel
from ccm.timestamps import timestamp

FORMAT = "cc-manager"
VERSION = 1
# Bounds of one read, and so of the memory that an export takes.
PAGE = 1_000
PIECE_ITEMS = 500
PIECE_BYTES = 2 * 2**20
# Approvals at once: each may hold a whole file that was to be written.
APPROVALS = 20
BEFORE_ALL = -(2**62)


def export(transaction: Transaction, session_id: str | None) -> Iterator[str]:
    """The lines of an export, from a transaction that holds one moment.

    Args:
        session_id: a session, or the SDK session of a run of it; it comes with all that it was forked from.

    Raises:
        SessionNotFound: there is no such session.
    """
    chosen = None if session_id is None else _line_of(transaction, session_id)
    yield _text(
        type="export",
        format=FORMAT,
        version=VERSION,
        exportedAt=timestamp(),
        lastSeq=runs.next_seq(transaction) - 1,
    )
    session_count = run_count = 0
    for session in _all(transaction) if chosen is None else chosen:
        session_count += 1
        yield _text(type="session", **archived(session))
        for run in _runs(transaction, session.id):
            run_count += 1
            yield _text(type="run", **archived(run))
            yield from _messages(transaction, run)
            yield from _approvals(transaction, run)
            yield from _transcripts(transaction, run)
    yield _text(type="end", sessions=session_count, runs=run_count)


def _line_of(transaction: Transaction, session_id: str) -> list[Session]:
    """A session after all those that it was forked from."""
    session: Session | None = sessions.get(transaction, session_id)
    line: list[Session] = []
    while session is not None:
        line.insert(0, session)
        parent = session.parent_session_id
        session = None if parent is None else sessions.find(transaction, parent)
    return line


def _all(transaction: Transaction) -> Iterator[Session]:
    after = BEFORE_ALL
    while found := archive.sessions_beyond(transaction, after, PAGE):
        for _, session_id in found:
            yield sessions.get(transaction, session_id)
        after = found[-1][0]


def _runs(transaction: Transaction, session_id: str) -> Iterator[Run]:
    for link in runs.links(transaction, session_id):
        yield runs.get(transaction, link.id)


def _text(**fields: Any) -> str:
    return to_json_text(fields) + "\n"


def archived(resource: StoredModel) -> dict[str, Any]:
    """What a line says of a resource: what the API shows, and the columns behind it that an import needs."""
    shown = resource.to_json()
    taking_part = [field for field in resource.shape.fields if field.archive is not Archive.LEFT_OUT]
    told = {field.shown: shown[field.shown] for field in taking_part if field.shown is not None}
    behind = {field.column: getattr(resource, field.name) for field in taking_part if field.shown is None}
    return {str(name): value for name, value in (told | behind).items()}


def _messages(transaction: Transaction, run: Run) -> Iterator[str]:
    through = run.message_count - 1

    def sizes(after: int) -> list[tuple[int, int]]:
        return messages.sizes(transaction, run.id, after, through, PIECE_ITEMS)

    for after, last in _pieces(sizes):
        for index, created_at, text in archive.dated_texts(transaction, run.id, after, last):
            # Not parsed: it is to be as it is stored, and there may be millions.
            fields = to_json_text({"type": "message", "runId": run.id, "index": index, "createdAt": created_at})
            yield f'{fields[:-1]},"message":{text}}}\n'


def _approvals(transaction: Transaction, run: Run) -> Iterator[str]:
    after = None
    while found := approvals.page(transaction, {"runId": run.id}, limit=APPROVALS, after=after):
        for approval in found:
            yield _text(type="approval", **archived(approval))
        after = found[-1].seq


def _transcripts(transaction: Transaction, run: Run) -> Iterator[str]:
    for key, updated_at_ms in transcripts.of_session(transaction, run.sdk_session_id).items():

        def sizes(after: int, key: TranscriptKey = key) -> list[tuple[int, int]]:
            return transcripts.sizes(transaction, key, after, PIECE_ITEMS)

        for after, last in _pieces(sizes):
            entries = transcripts.texts(transaction, key, after, last)
            fields = to_json_text(
                {
                    "type": "transcript",
                    "sdkSessionId": run.sdk_session_id,
                    "projectKey": key.project_key,
                    "subpath": key.subpath,
                    "updatedAtMs": updated_at_ms,
                    "index": after + 1,
                }
            )
            yield f'{fields[:-1]},"entries":[{",".join(entries)}]}}\n'


def _pieces(sizes: Callable[[int], list[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """Ranges of indexes, after one and through another, of a bounded number of bytes each.

    Args:
        sizes: index and bytes of the next few items after an index.
    """
    after = -1
    while found := sizes(after):
        through, total = after, 0
        for index, size in found:
            total += size
            if total > PIECE_BYTES and through > after:
                break
            through = index
        yield after, through
        after = through
