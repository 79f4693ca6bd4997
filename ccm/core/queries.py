"""The reading side of the service: short reads of committed data."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from ccm.core.lineage import ForkPoint, Segment, find_fork_point, session_segments
from ccm.db import approvals, deliveries, events, messages, runs, sessions
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.db.runs import Link
from ccm.errors import DatabaseClosed, ShuttingDown, StorageError, StorageUnavailable, ValidationError
from ccm.models import Approval, Delivery, Event, IdempotencyKey, Run, RunStatus, Session

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

# Bounds of one read, and so of the memory that each of hundreds of slow readers of long lists and streams takes.
CHUNK_BYTES = 2**18
CHUNK_MESSAGES = 500
CHUNK_EVENTS = 100

# An approval as the API shows it.
Shown = Mapping[str, Any]


class Batch(NamedTuple):
    """The next part of a run's stream.

    Attributes:
        messages: each with its index.
        approvals: those requested or resolved, each with the id of its event.
        ended: the run, once it has ended and everything before its end has been read.
        more: the next part is stored already, unless something other than the service has deleted it.
    """

    messages: list[tuple[int, str]]
    approvals: Sequence[tuple[int, Shown]]
    ended: Run | None
    more: bool


class EventBatch(NamedTuple):
    """The next part of the stream of all events.

    Attributes:
        more: the next part is stored already.
    """

    events: list[Event]
    more: bool


class ApprovalSnapshot(NamedTuple):
    """Approvals of a run at one moment.

    Attributes:
        through: the id of the last event that they include; None if the run never asks for approvals.
    """

    approvals: list[Shown]
    through: int | None


def _query(method: Callable[Concatenate[Queries, Transaction, P], T]) -> Callable[Concatenate[Queries, P], T]:
    """Run a method in a transaction of its own. It then also raises Unavailable if the database cannot be read."""

    @wraps(method)
    def read(queries: Queries, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with queries.database.transaction() as transaction:
                return method(queries, transaction, *args, **kwargs)
        except DatabaseClosed:
            raise ShuttingDown from None
        except StorageError as error:
            log.debug("a read failed: %s", error, extra={"event": "read_failed"})
            raise StorageUnavailable(f"The database cannot be read: {error.summary}. Try again.") from None

    return read


class Queries:
    """Reads of committed data. Each is short and returns its connection: no slow client holds a read open."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # ---- runs and sessions

    @_query
    def run(self, transaction: Transaction, run_id: str) -> Run:
        """Return a run.

        Raises:
            RunNotFound: there is no such run.
        """
        return runs.get(transaction, run_id)

    @_query
    def run_of_key(self, transaction: Transaction, key: IdempotencyKey) -> Run | None:
        """Return the run that a request with this key created, or None.

        Raises:
            KeyReused: the key belongs to a different request.
        """
        return runs.find_by_idempotency_key(transaction, key)

    @_query
    def runs(self, transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None) -> list[Run]:
        """Return runs after the one with seq `after`, newest first."""
        return runs.page(transaction, filters, limit=limit, after=after)

    @_query
    def session(self, transaction: Transaction, session_id: str) -> Session:
        """Return a session by its id, or by the SDK session id of any of its runs.

        Raises:
            SessionNotFound: there is no such session.
        """
        return sessions.get(transaction, session_id)

    @_query
    def sessions(
        self, transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None
    ) -> list[Session]:
        """Return sessions after the one whose last run has seq `after`, latest activity first."""
        return sessions.page(transaction, filters, limit=limit, after=after)

    @_query
    def session_runs(self, transaction: Transaction, session_id: str, *, limit: int, after: int | None) -> list[Run]:
        """Return the runs of a session after the one with seq `after`, oldest first."""
        session = sessions.get(transaction, session_id)
        return runs.page(transaction, {"sessionId": session.id}, limit=limit, after=after, oldest_first=True)

    @_query
    def forks(self, transaction: Transaction, session_id: str, *, limit: int, after: int | None) -> list[Session]:
        """Return the forks of a session, latest activity first."""
        session = sessions.get(transaction, session_id)
        return sessions.page(transaction, {"parentSessionId": session.id}, limit=limit, after=after)

    @_query
    def fork_point(
        self, transaction: Transaction, session_id: str, at_run_id: str | None, at_message: str | None
    ) -> ForkPoint:
        """Return the place where a fork of a session branches off.

        Raises:
            NotFound: there is no such session or run.
            SessionNotResumable: the session has no run to fork from yet.
            ValidationError: the message cannot be forked from; names one that can.
        """
        return find_fork_point(transaction, session_id, at_run_id, at_message)

    # ---- approvals

    @_query
    def approval(self, transaction: Transaction, approval_id: str) -> Approval:
        """Return an approval.

        Raises:
            ApprovalNotFound: there is no such approval.
        """
        return approvals.get(transaction, approval_id)

    @_query
    def approvals(
        self, transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None
    ) -> list[Approval]:
        """Return approvals after the one with seq `after`, oldest first."""
        return approvals.page(transaction, filters, limit=limit, after=after)

    @_query
    def run_approvals(self, transaction: Transaction, run_id: str, *, limit: int, after: int | None) -> list[Approval]:
        """Return the approvals of a run after the one with seq `after`, oldest first."""
        run = runs.get(transaction, run_id)
        return approvals.page(transaction, {"runId": run.id}, limit=limit, after=after)

    @_query
    def approval_snapshot(self, transaction: Transaction, run_id: str, after: int = -1) -> ApprovalSnapshot:
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

    # ---- messages

    @_query
    def run_segment(self, transaction: Transaction, run_id: str, after: int) -> tuple[Link, Segment]:
        """Return a run's link, and its present messages after the one with index `after`."""
        link = runs.get_link(transaction, run_id)
        return link, Segment(link.id, after, link.message_count - 1)

    @_query
    def session_segments(
        self, transaction: Transaction, session_id: str, after: tuple[str, int] | None, with_ancestors: bool
    ) -> tuple[Session, list[Segment]]:
        """Return a session, and the present messages of its runs after a given one.

        Args:
            after: the run and the index of that message; None for all messages.
            with_ancestors: put the runs that the session continues in front.

        Raises:
            ValidationError: `after` names a run or a message that is not part of this history.
        """
        session = sessions.get(transaction, session_id)
        segments = session_segments(transaction, session, with_ancestors=with_ancestors)
        if after is None:
            return session, segments
        run_id, index = after
        places = [place for place, segment in enumerate(segments) if segment.run_id == run_id]
        if not places:
            raise ValidationError(f"after: run {run_id} is not part of this history.", field="after")
        if index > segments[places[0]].through:
            raise ValidationError(f"after: message {index} of run {run_id} is not in this history.", field="after")
        rest = segments[places[0] :]
        return session, [replace(rest[0], after=index), *rest[1:]]

    @_query
    def cut(
        self, transaction: Transaction, segments: Sequence[Segment], types: Sequence[str], limit: int
    ) -> list[Segment]:
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

    @_query
    def has_any(self, transaction: Transaction, segments: Sequence[Segment], types: Sequence[str]) -> bool:
        """Return whether the segments have a message of the given types."""
        return any(
            messages.indexes(transaction, segment.run_id, segment.after, segment.through, types=types, limit=1)
            for segment in segments
        )

    def chunks(self, segments: Sequence[Segment], types: Sequence[str]) -> Iterator[list[str]]:
        """Yield the JSON texts of the messages in the segments, unparsed, a bounded number of bytes at a time."""
        for segment in segments:
            after = segment.after
            ends: deque[int] = deque()
            while after < segment.through:
                texts, after = self._chunk(segment, after, ends, types)
                if texts:
                    yield texts

    @_query
    def _chunk(
        self, transaction: Transaction, segment: Segment, after: int, ends: deque[int], types: Sequence[str]
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

    @_query
    def next_batch(
        self, transaction: Transaction, run_id: str, after: int, after_event: int | None = None
    ) -> Batch | None:
        """Return what follows a message of a run and one of its events; None if there is nothing yet.

        Args:
            after: the index of that message.
            after_event: the id of that event; None leaves approvals out.
        """
        # Read the run before its messages: if it has ended, its count is final and all its messages are stored.
        link = runs.get_link(transaction, run_id)
        rest = Segment(run_id, after, link.message_count - 1)
        numbered: list[tuple[int, str]] = []
        # There may be fewer messages than the count says if something other than the service has deleted some.
        if rest.after < rest.through and (indexes := _next_indexes(transaction, rest, after)):
            texts = messages.texts(transaction, run_id, after, indexes[-1])
            numbered = list(zip(indexes, texts, strict=True))
        changes = () if after_event is None else approvals.changes(transaction, run_id, after_event)
        has_ended = link.status != RunStatus.RUNNING
        if numbered or changes:
            more = has_ended or (bool(numbered) and numbered[-1][0] < rest.through)
            return Batch(numbered, changes, None, more)
        return Batch([], (), runs.get(transaction, run_id), more=False) if has_ended else None

    # ---- events and deliveries

    @_query
    def events(self, transaction: Transaction, after: int) -> EventBatch | None:
        """Return the next events after one, a bounded number of bytes; None if there is none yet."""
        sizes = events.sizes(transaction, after, CHUNK_EVENTS + 1)
        ids = _first_chunk(sizes[:CHUNK_EVENTS])
        return EventBatch(events.read(transaction, after, ids[-1]), len(ids) < len(sizes)) if ids else None

    @_query
    def last_event(self, transaction: Transaction) -> int:
        """Return the id of the newest event, 0 if there is none."""
        return events.last_id(transaction)

    @_query
    def last_event_ever(self, transaction: Transaction) -> int:
        """Return the greatest id that any event has ever had: nobody can have seen a later one."""
        return events.last_given(transaction)

    @_query
    def deliveries(self, transaction: Transaction, run_id: str, *, limit: int, after: int | None) -> list[Delivery]:
        """Return a run's webhook deliveries after the one with id `after`, oldest first.

        Raises:
            RunNotFound: there is no such run.
        """
        return deliveries.page(transaction, runs.get(transaction, run_id).id, limit=limit, after=after)


def _next_indexes(transaction: Transaction, segment: Segment, after: int) -> list[int]:
    """Return the indexes of a segment's next messages: as many as fit a chunk, but at least one if there is one."""
    return _first_chunk(messages.sizes(transaction, segment.run_id, after, segment.through, CHUNK_MESSAGES))


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
