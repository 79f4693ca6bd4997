"""What has been recorded, and waiting for more of it: the reading side of the service."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from ccm.core.lineage import ForkPoint, Segment, find_fork_point, line, own_line
from ccm.core.storage.notifier import Notifier
from ccm.db import approvals, deliveries, events, messages, runs, sessions
from ccm.db.driver.database import Database
from ccm.db.driver.transaction import Transaction
from ccm.errors import DatabaseClosed, ShuttingDown, StorageError, StorageUnavailable, ValidationError
from ccm.models import Approval, Delivery, Event, IdempotencyKey, Run, RunStatus, Session

log = logging.getLogger(__name__)

T = TypeVar("T")
P = ParamSpec("P")

# Bounds of one read, and so of what each of hundreds of slow readers of long lists and streams may have in memory.
CHUNK_BYTES = 2**18
CHUNK_MESSAGES = 500
CHUNK_EVENTS = 100
# How long a wait sleeps before it looks whether its client is still there (seconds).
POLL_INTERVAL = 0.5
# How long it relies on the bell (seconds): who was not rung for, because of a fault, must not wait for ever.
RELY_INTERVAL = 5.0


# An approval as the API shows it.
Shown = Mapping[str, Any]


class Batch(NamedTuple):
    """Messages with their indexes; what was asked or answered since, each with the id of its event; and the run, once
    it has ended and all else was told."""

    messages: list[tuple[int, str]]
    approvals: Sequence[tuple[int, Shown]]
    ended: Run | None


class Asked(NamedTuple):
    """What a run waits for and what a reader may have missed; and the event up to which that is so, None if the run
    never asks."""

    approvals: list[Shown]
    through: int | None


def _query(method: Callable[Concatenate[Queries, Transaction, P], T]) -> Callable[Concatenate[Queries, P], T]:
    """Give a method its transaction. It also raises Unavailable, if the database cannot be read."""

    @wraps(method)
    def read(queries: Queries, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with queries.database.transaction() as transaction:
                return method(queries, transaction, *args, **kwargs)
        except DatabaseClosed:
            raise ShuttingDown from None
        except StorageError as error:
            log.debug("a read failed: %s", error)
            raise StorageUnavailable(f"The database cannot be read: {error.summary}. Try again.") from None

    return read


class Queries:
    """Reads of what is committed. Each is short and gives its connection back; none is held open to a slow client."""

    def __init__(self, database: Database, notifier: Notifier) -> None:
        self.database = database
        self._notifier = notifier

    # ---- runs and sessions

    @_query
    def run(self, transaction: Transaction, run_id: str) -> Run:
        """
        Raises:
            RunNotFound: there is no such run.
        """
        return runs.get(transaction, run_id)

    @_query
    def run_of_key(self, transaction: Transaction, key: IdempotencyKey) -> Run | None:
        """The run that a request with this key has made, None if there was none.

        Raises:
            KeyReused: that was another request.
        """
        return runs.find_by_idempotency_key(transaction, key)

    @_query
    def runs(self, transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None) -> list[Run]:
        """Runs, the newest first, beyond the one with seq `after`."""
        return runs.page(transaction, filters, limit=limit, after=after)

    @_query
    def session(self, transaction: Transaction, session_id: str) -> Session:
        """A session by its id, or by the SDK session id of any of its runs.

        Raises:
            SessionNotFound: there is no such session.
        """
        return sessions.get(transaction, session_id)

    @_query
    def sessions(
        self, transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None
    ) -> list[Session]:
        """Sessions, the latest activity first, beyond the one whose last run has seq `after`."""
        return sessions.page(transaction, filters, limit=limit, after=after)

    @_query
    def session_runs(self, transaction: Transaction, session_id: str, *, limit: int, after: int | None) -> list[Run]:
        """The runs of a session, the oldest first, beyond the one with seq `after`."""
        session = sessions.get(transaction, session_id)
        return runs.page(transaction, {"sessionId": session.id}, limit=limit, after=after, oldest_first=True)

    @_query
    def forks(self, transaction: Transaction, session_id: str, *, limit: int, after: int | None) -> list[Session]:
        """The sessions that were forked from one, the latest activity first."""
        session = sessions.get(transaction, session_id)
        return sessions.page(transaction, {"parentSessionId": session.id}, limit=limit, after=after)

    @_query
    def fork_point(
        self, transaction: Transaction, session_id: str, at_run_id: str | None, at_message: str | None
    ) -> ForkPoint:
        """Where a fork of a session is to branch off.

        Raises:
            NotFound: there is no such session or run.
            ValidationError: the message or the run is not one to fork from; says which is.
        """
        return find_fork_point(transaction, session_id, at_run_id, at_message)

    # ---- approvals

    @_query
    def approval(self, transaction: Transaction, approval_id: str) -> Approval:
        """
        Raises:
            ApprovalNotFound: there is no such approval.
        """
        return approvals.get(transaction, approval_id)

    @_query
    def approvals(
        self, transaction: Transaction, filters: Mapping[str, str], *, limit: int, after: int | None
    ) -> list[Approval]:
        """Approvals, the oldest first, beyond the one with seq `after`."""
        return approvals.page(transaction, filters, limit=limit, after=after)

    @_query
    def run_approvals(self, transaction: Transaction, run_id: str, *, limit: int, after: int | None) -> list[Approval]:
        """The approvals of a run, the oldest first, beyond the one with seq `after`."""
        run = runs.get(transaction, run_id)
        return approvals.page(transaction, {"runId": run.id}, limit=limit, after=after)

    @_query
    def asked(self, transaction: Transaction, run_id: str, after: int = -1) -> Asked:
        """What a run waits for at this moment; for who comes back also what was resolved since.

        Args:
            after: the index of the last message that was read, -1 for none.
        """
        if not runs.get(transaction, run_id).approvals:
            return Asked([], None)
        # The event first: on PostgreSQL a change may be committed in between, and is then told again, not lost.
        through = approvals.last_event(transaction, run_id)
        if after < 0:
            found = approvals.pending(transaction, run_id)
        else:
            found = approvals.pending_or_resolved_since(transaction, run_id, after)
        return Asked([approval.to_json() for approval in found], through)

    # ---- messages

    @_query
    def run_segment(self, transaction: Transaction, run_id: str, after: int) -> tuple[Run, Segment]:
        """A run, and what it has beyond a message at this moment."""
        run = runs.get(transaction, run_id)
        return run, Segment(run.id, after, run.message_count - 1)

    @_query
    def session_segments(
        self, transaction: Transaction, session_id: str, after: tuple[str, int] | None, with_ancestors: bool
    ) -> tuple[Session, list[Segment]]:
        """A session, and what its runs have beyond a message at this moment.

        Args:
            after: the run and the index of that message; None for all.
            with_ancestors: also what the session continued, in front.

        Raises:
            ValidationError: `after` names a run or a message that is not among them.
        """
        session = sessions.get(transaction, session_id)
        segments = line(transaction, session) if with_ancestors else own_line(transaction, session)
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
        """The beginning of the segments that holds the first `limit` messages of the given types."""
        kept: list[Segment] = []
        wanted = limit
        for segment in segments:
            found = messages.indexes(
                transaction, segment.run_id, segment.after, segment.through, types=types, limit=wanted
            )
            wanted -= len(found)
            if wanted == 0:
                kept.append(replace(segment, through=found[-1]))
                return kept
            kept.append(segment)
        return kept

    @_query
    def has_any(self, transaction: Transaction, segments: Sequence[Segment], types: Sequence[str]) -> bool:
        """Whether there is a message of the given types in the segments."""
        return any(
            messages.indexes(transaction, segment.run_id, segment.after, segment.through, types=types, limit=1)
            for segment in segments
        )

    def chunks(self, segments: Sequence[Segment], types: Sequence[str]) -> Iterator[list[str]]:
        """The JSON texts of the messages in the segments, a bounded number of bytes at a time, nothing parsed."""
        for segment in segments:
            after = segment.after
            while after < segment.through:
                texts, after = self._chunk(segment, after, types)
                if texts:
                    yield texts

    @_query
    def _chunk(
        self, transaction: Transaction, segment: Segment, after: int, types: Sequence[str]
    ) -> tuple[list[str], int]:
        """The next texts of a segment, and the index that they reach to."""
        indexes = _next_indexes(transaction, segment, after)
        if not indexes:
            return [], segment.through
        return messages.texts(transaction, segment.run_id, after, indexes[-1], types), indexes[-1]

    @_query
    def news(self, transaction: Transaction, run_id: str, after: int, event: int | None = None) -> Batch | None:
        """What comes after a message of a run and one of its events; None if nothing yet.

        Args:
            event: beyond it approvals are looked for; None for none.
        """
        # The run before its messages: when it has ended, its count is final, and all of them are stored.
        link = runs.get_link(transaction, run_id)
        rest = Segment(run_id, after, link.message_count - 1)
        found: list[tuple[int, str]] = []
        # Fewer may be there than are counted, where something other than the service has deleted some.
        if rest.after < rest.through and (indexes := _next_indexes(transaction, rest, after)):
            texts = messages.texts(transaction, run_id, after, indexes[-1])
            found = list(zip(indexes, texts, strict=True))
        changes = () if event is None else approvals.changes(transaction, run_id, event)
        if found or changes:
            return Batch(found, changes, None)
        return None if link.status == RunStatus.RUNNING else Batch([], (), runs.get(transaction, run_id))

    # ---- events and deliveries

    @_query
    def events(self, transaction: Transaction, after: int) -> list[Event] | None:
        """The next events beyond one, a bounded number of bytes; None if there is none yet."""
        ids = _first_bytes(events.sizes(transaction, after, CHUNK_EVENTS))
        return events.read(transaction, after, ids[-1]) if ids else None

    @_query
    def last_event(self, transaction: Transaction) -> int:
        """The id of the newest event, 0 if there is none."""
        return events.last_id(transaction)

    @_query
    def last_event_ever(self, transaction: Transaction) -> int:
        """The greatest id that any event has ever had: what is beyond it nobody has seen."""
        return events.last_given(transaction)

    @_query
    def deliveries(self, transaction: Transaction, run_id: str, *, limit: int, after: int | None) -> list[Delivery]:
        """What a run's webhooks have come to, the oldest first, beyond the one with id `after`.

        Raises:
            RunNotFound: there is no such run.
        """
        return deliveries.page(transaction, runs.get(transaction, run_id).id, limit=limit, after=after)

    # ---- waiting

    @property
    def complete(self) -> bool:
        """Whether all is stored that ever will be, because the service stops."""
        return self._notifier.closed

    def wait(self, key: str, seconds: float, look: Callable[[], T | None], gone: Callable[[], bool]) -> T | None:
        """What `look` finds, as soon as it finds something; None when the time has passed or the client has gone.

        Args:
            key: the run or session whose news is waited for.
            gone: whether the client has left.
        """
        deadline = time.monotonic() + seconds
        with self._notifier.subscribe(key) as rung:
            while True:
                rung.clear()
                found = look()
                remaining = deadline - time.monotonic()
                # Who has left is not waited for: behind a request that its client left there may be more of it.
                if found is not None or remaining <= 0 or self._notifier.closed or gone():
                    return found
                relied = time.monotonic() + RELY_INTERVAL
                while not rung.wait(min(POLL_INTERVAL, remaining)):
                    now = time.monotonic()
                    remaining = deadline - now
                    if remaining <= 0 or gone():
                        return look()
                    if now >= relied:
                        break


def _next_indexes(transaction: Transaction, segment: Segment, after: int) -> list[int]:
    """The indexes of the next messages of a segment: one at the least, if there is one, and no more than a chunk."""
    return _first_bytes(messages.sizes(transaction, segment.run_id, after, segment.through, CHUNK_MESSAGES))


def _first_bytes(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """The first of these numbers with their sizes: one at the least, if there is one, and no more than a chunk."""
    total = 0
    numbers: list[int] = []
    for number, size in sizes:
        total += size
        if total > CHUNK_BYTES and numbers:
            break
        numbers.append(number)
    return numbers
