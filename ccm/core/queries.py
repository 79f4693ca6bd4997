"""The reading side of the service: short reads of committed data."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import dropwhile
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from ccm.core.lineage import Segment, find_fork_point, session_segments
from ccm.core.search import search_sessions
from ccm.core.storage.shared_reads import Part, Place
from ccm.db import approvals, deliveries, events, messages, runs, sessions
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.runs import Link
from ccm.errors import (
    DatabaseClosed,
    RunNotFound,
    SessionNotFound,
    ShuttingDown,
    StorageError,
    StorageUnavailable,
    ValidationError,
)
from ccm.models import Approval, Delivery, Run, Session

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

# Bounds of one read, and so of the memory that each of hundreds of slow readers of long lists and streams takes.
CHUNK_BYTES = 2**18
CHUNK_MESSAGES = 500
CHUNK_EVENTS = 100


class ApprovalSnapshot(NamedTuple):
    """Approvals of a run at one moment, as the API shows them.

    Attributes:
        through: the id of the last event that they include; None if the run never asks for approvals.
    """

    approvals: list[Mapping[str, Any]]
    through: int | None


def _query(read: Callable[Concatenate[Transaction, P], T]) -> Callable[Concatenate[Queries, P], T]:
    """Return the method that calls a function in the transaction of `together`, or in one of its own.

    It then also raises Unavailable if the database cannot be read.
    """

    @wraps(read)
    def query(queries: Queries, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if queries._transaction is not None:
            return read(queries._transaction, *args, **kwargs)
        with queries.together() as own:
            return query(own, *args, **kwargs)

    return query


# ---- ids that clients confuse


def _run(transaction: Transaction, run_id: str) -> Run:
    """Return a run.

    Raises:
        RunNotFound: there is no such run. The message says if it is a session.
    """
    try:
        return runs.get(transaction, run_id)
    except RunNotFound:
        if sessions.find(transaction, run_id) is None:
            raise
    raise RunNotFound(f"There is no run {run_id}: it is a session. GET /api/sessions/{run_id}/runs lists its runs.")


def _session(transaction: Transaction, session_id: str) -> Session:
    """Return a session by its own id, or by the SDK session id of any of its runs.

    Raises:
        SessionNotFound: there is no such session. The message says if it is a run.
    """
    try:
        return sessions.get(transaction, session_id)
    except SessionNotFound:
        run = runs.find(transaction, session_id)
        if run is None:
            raise
    raise SessionNotFound(f"There is no session {session_id}: it is a run of session {run.session_id}.")


# ---- pages


def _session_runs(transaction: Transaction, session_id: str, *, limit: int, after: int | None) -> list[Run]:
    """Return the runs of a session after the one with seq `after`, oldest first."""
    session = _session(transaction, session_id)
    return runs.page(transaction, {"sessionId": session.id}, limit=limit, after=after, oldest_first=True)


def _forks(transaction: Transaction, session_id: str, *, limit: int, after: int | None) -> list[Session]:
    """Return the forks of a session, latest activity first."""
    session = _session(transaction, session_id)
    return sessions.forks(transaction, session.id, limit=limit, after=after)


def _run_approvals(transaction: Transaction, run_id: str, *, limit: int, after: int | None) -> list[Approval]:
    """Return the approvals of a run after the one with seq `after`, oldest first."""
    run = _run(transaction, run_id)
    return approvals.page(transaction, {"runId": run.id}, limit=limit, after=after)


def _deliveries(transaction: Transaction, run_id: str, *, limit: int, after: int | None) -> list[Delivery]:
    """Return a run's webhook deliveries after the one with id `after`, oldest first."""
    return deliveries.page(transaction, _run(transaction, run_id).id, limit=limit, after=after)


# ---- parts of streams


def _approval_snapshot(transaction: Transaction, run_id: str, after: int = -1) -> ApprovalSnapshot:
    """Return the pending approvals of a run and, for a reader that reconnects, those resolved meanwhile.

    Args:
        after: the index of the last message that was read, -1 for none.
    """
    if not runs.get(transaction, run_id).approvals:
        return ApprovalSnapshot([], None)
    # Read the event first: a change that PostgreSQL commits in between is then sent twice instead of missed.
    through = approvals.last_event(transaction, run_id)
    if after < 0:
        current = approvals.pending(transaction, run_id)
    else:
        current = approvals.pending_or_resolved_since(transaction, run_id, after)
    return ApprovalSnapshot([approval.to_json() for approval in current], through)


def _next_part(transaction: Transaction, run_id: str, place: Place) -> Part | None:
    """Return what follows a place in a run's stream: its messages and approvals, then its end; None if nothing does.

    Args:
        place: the index of a message and, unless approvals are left out, the id of an event.
    """
    after, *after_event = place
    # Read the run before its messages: if it has ended, its count is final and all its messages are stored.
    link = runs.get_link(transaction, run_id)
    last = link.message_count - 1
    indexes: list[int] = []
    texts: list[str] = []
    # There may be fewer messages than the count says if something other than the service has deleted some.
    if after < last and (indexes := _first_chunk(messages.sizes(transaction, run_id, after, last, CHUNK_MESSAGES))):
        texts = messages.texts(transaction, run_id, after, indexes[-1])
    changes = [approvals.changes(transaction, run_id, event) for event in after_event]
    lists = (list(zip(indexes, texts, strict=True)), *changes)
    if any(lists):
        more = link.ended or (bool(indexes) and indexes[-1] < last)
        return Part(place, lists, sum(map(len, texts)), more)
    return Part(place, lists, ended=runs.get(transaction, run_id)) if link.ended else None


def _events(transaction: Transaction, place: Place) -> Part | None:
    """Return the next events after the one whose id is the place, a bounded number of bytes; None if there are none."""
    sizes = events.sizes(transaction, place[0], CHUNK_EVENTS + 1)
    ids = _first_chunk(sizes[:CHUNK_EVENTS])
    if not ids:
        return None
    found = [(event.id, event) for event in events.read(transaction, place[0], ids[-1])]
    return Part(place, (found,), sum(len(event.json) for _, event in found), more=len(ids) < len(sizes))


# ---- messages


def _run_segment(transaction: Transaction, run_id: str, after: int) -> tuple[Link, Segment]:
    """Return a run's link, and its present messages after the one with index `after`."""
    link = runs.get_link(transaction, run_id)
    return link, Segment(link.id, after, link.message_count - 1)


def _session_segments(
    transaction: Transaction, session_id: str, after: tuple[str, int] | None, with_ancestors: bool
) -> tuple[Session, list[Segment]]:
    """Return a session, and the present messages of its runs after a given one.

    Args:
        after: the run and the index of that message; None for all messages.
        with_ancestors: put the runs that the session continues in front.

    Raises:
        ValidationError: `after` names a run or a message that is not part of this history.
    """
    session = _session(transaction, session_id)
    segments = session_segments(transaction, session, with_ancestors=with_ancestors)
    if after is None:
        return session, segments
    run_id, index = after
    rest = list(dropwhile(lambda segment: segment.run_id != run_id, segments))
    if not rest:
        raise ValidationError(f"after: run {run_id} is not part of this history.", field="after")
    if index > rest[0].through:
        raise ValidationError(f"after: message {index} of run {run_id} is not in this history.", field="after")
    return session, [replace(rest[0], after=index), *rest[1:]]


def _cut(transaction: Transaction, segments: Sequence[Segment], types: Sequence[str], limit: int) -> list[Segment]:
    """Return the beginning of the segments, up to the `limit`-th message of the given types."""
    kept: list[Segment] = []
    wanted = limit
    for segment in segments:
        indexes = messages.indexes(
            transaction, segment.run_id, segment.after, segment.through, types=types, limit=wanted
        )
        wanted -= len(indexes)
        if wanted == 0:
            kept.append(replace(segment, through=indexes[-1]))
            return kept
        kept.append(segment)
    return kept


def _has_any(transaction: Transaction, segments: Sequence[Segment], types: Sequence[str]) -> bool:
    """Return whether the segments have a message of the given types."""
    return any(
        messages.indexes(transaction, segment.run_id, segment.after, segment.through, types=types, limit=1)
        for segment in segments
    )


def _chunk(
    transaction: Transaction, segment: Segment, after: int, ends: deque[int], types: Sequence[str]
) -> tuple[list[str], int]:
    """Return the next texts of a segment, and the index of the last message that was considered.

    Args:
        ends: the last indexes of the next chunks. Used up, and refilled when there are none: reading the sizes anew
            for each chunk would take as long as reading the texts.
    """
    if not ends:
        ends.extend(_ends(messages.sizes(transaction, segment.run_id, after, segment.through, CHUNK_MESSAGES)))
    if not ends:
        return [], segment.through
    end = ends.popleft()
    return messages.texts(transaction, segment.run_id, after, end, types), end


def _ends(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return the last index of each chunk of some messages.

    Args:
        sizes: index and bytes of the next CHUNK_MESSAGES messages.
    """
    may_continue = len(sizes) == CHUNK_MESSAGES
    ends: list[int] = []
    while chunk := _first_chunk(sizes):
        ends.append(chunk[-1])
        sizes = sizes[len(chunk) :]
    # The last chunk may have room for messages that follow; many small chunks would make a short list a long one.
    return ends[:-1] if may_continue and len(ends) > 1 else ends


def _first_chunk(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return the first of some numbered texts: as many as fit a chunk, but at least one if there is one.

    Args:
        sizes: number and bytes of each text.
    """
    total = 0
    numbers: list[int] = []
    for number, size in sizes:
        total += size
        if total > CHUNK_BYTES and numbers:
            break
        numbers.append(number)
    return numbers


class Queries:
    """Reads of committed data. Each is short and returns its connection: no slow client holds a read open.

    Each query is the function that is named here, called in a transaction of its own unless in `together`.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self._transaction: Transaction | None = None

    @contextmanager
    def together(self) -> Iterator[Queries]:
        """Yield queries that share one transaction within the block, and have one each afterwards.

        A transaction takes as long as several short reads.

        Raises:
            Unavailable: the database cannot be read.
        """
        queries = Queries(self.database)
        try:
            with self.database.transaction() as queries._transaction:
                yield queries
        except DatabaseClosed:
            raise ShuttingDown from None
        except StorageError as error:
            log.debug("a read failed: %s", error, extra={"event": "read_failed"})
            raise StorageUnavailable(f"The database cannot be read: {error.summary}. Try again.") from None
        finally:
            queries._transaction = None

    run = _query(_run)
    run_of_key = _query(runs.find_by_idempotency_key)
    runs = _query(runs.page)
    session = _query(_session)
    sessions = _query(sessions.page)
    search_sessions = _query(search_sessions)
    session_runs = _query(_session_runs)
    forks = _query(_forks)
    fork_point = _query(find_fork_point)
    approval = _query(approvals.get)
    approvals = _query(approvals.page)
    run_approvals = _query(_run_approvals)
    approval_snapshot = _query(_approval_snapshot)
    run_segment = _query(_run_segment)
    session_segments = _query(_session_segments)
    cut = _query(_cut)
    has_any = _query(_has_any)
    next_part = _query(_next_part)
    last_event = _query(events.last_id)
    # The greatest id that any event has ever had: nobody can have seen a later one.
    last_event_ever = _query(events.last_given)
    events = _query(_events)
    deliveries = _query(_deliveries)
    _chunk = _query(_chunk)

    def chunks(self, segments: Sequence[Segment], types: Sequence[str]) -> Iterator[list[str]]:
        """Yield the JSON texts of the messages in the segments, unparsed, a bounded number of bytes at a time."""
        for segment in segments:
            after = segment.after
            ends: deque[int] = deque()
            while after < segment.through:
                texts, after = self._chunk(segment, after, ends, types)
                if texts:
                    yield texts
