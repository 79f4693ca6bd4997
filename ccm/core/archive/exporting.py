"""Sessions as JSON Lines: one object a line, each text as it is stored.

The order is the one that they can be read back in: each session after the one it was forked from, with its runs, and
each run with its messages and transcripts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ccm.core.lookup import find_run, find_session
from ccm.db import approvals, archive, messages, runs, sessions, transcripts
from ccm.db.driver.database import Transaction
from ccm.db.transcripts import TranscriptKey
from ccm.models import Run, Session, timestamp, to_json_text

FORMAT = "cc-manager"
VERSION = 1
# Bounds of one read, and so of the memory that an export takes.
PAGE = 1_000
PIECE_ITEMS = 500
PIECE_BYTES = 2 * 2**20
# Approvals at once: each may hold a whole file that was to be written.
APPROVALS = 20
BEFORE_ALL = -(2**62)
# What the API tells of a run at the moment and of what is elsewhere in the line.
PASSING = ("id", "queuePosition", "pendingApprovals", "permissionDenials")


def export(transaction: Transaction, session_id: str | None) -> Iterator[str]:
    """The lines of an export, from a transaction that holds one moment.

    Args:
        session_id: a session, or the SDK session of a run of it; it comes with all that it was forked from.

    Raises:
        NotFound: SESSION_NOT_FOUND.
    """
    chosen = None if session_id is None else _line_of(transaction, session_id)
    yield _text(
        type="export",
        format=FORMAT,
        version=VERSION,
        exportedAt=timestamp(),
        lastSeq=archive.last_seq(transaction) or 0,
    )
    session_count = run_count = 0
    for session in _all(transaction) if chosen is None else chosen:
        session_count += 1
        yield _session(session)
        for run in _runs(transaction, session.id):
            run_count += 1
            yield _run(transaction, run)
            yield from _messages(transaction, run)
            yield from _approvals(transaction, run)
            yield from _transcripts(transaction, run)
    yield _text(type="end", sessions=session_count, runs=run_count)


def _line_of(transaction: Transaction, session_id: str) -> list[Session]:
    """A session after all those that it was forked from."""
    session: Session | None = find_session(transaction, session_id)
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
            yield find_session(transaction, session_id)
        after = found[-1][0]


def _runs(transaction: Transaction, session_id: str) -> Iterator[Run]:
    for link in runs.links(transaction, session_id):
        yield find_run(transaction, link.id)


def _text(**fields: Any) -> str:
    return to_json_text(fields) + "\n"


def _session(session: Session) -> str:
    shown = session.to_json()
    del shown["status"]
    return _text(type="session", **shown)


def _run(transaction: Transaction, run: Run) -> str:
    shown = {name: value for name, value in run.to_json().items() if name not in PASSING}
    key, digest = archive.request_key(transaction, run.id)
    return _text(
        type="run",
        **shown,
        seq=run.seq,
        forkAtMessage=run.fork_at_message,
        forkAtIndex=run.fork_at_index,
        hasTranscript=bool(run.has_transcript),
        idempotencyKey=key,
        requestDigest=digest,
    )


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
            shown = approval.to_json()
            # They say once more what `approvalId`, the run, `status` and `resolution` say.
            for name in ("id", "sessionId", "decision"):
                del shown[name]
            yield _text(type="approval", **shown)
        after = found[-1].seq


def _transcripts(transaction: Transaction, run: Run) -> Iterator[str]:
    for key in transcripts.of_session(transaction, run.sdk_session_id):
        updated_at_ms = transcripts.updated_at_ms(transaction, key)

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
