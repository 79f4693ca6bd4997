"""Streams of runs, sessions and events: first everything stored after a given place, then new data as it is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ccm.core.queries import Queries, Shown
from ccm.core.storage.notifier import EVENTS, POLL_INTERVAL, Notifier
from ccm.errors import Unavailable
from ccm.models import Event, Run

T = TypeVar("T")

# How long a stream stays silent before it says that nothing has happened (seconds): proxies close a connection that is
# silent for 30 or 60.
KEEPALIVE_INTERVAL = 15.0


@dataclass(frozen=True)
class Messages:
    """Messages of a run in order, each with its index."""

    run_id: str
    numbered: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class ApprovalState:
    """An approval at the moment when it was requested or resolved, as the API shows it.

    It has no place in the order of the messages.
    """

    shown: Shown


# A Run means that it has ended; None means that nothing has happened for a while.
StreamItem = Messages | ApprovalState | Run | None


class Stream:
    """What one reader follows: everything in order, each message once. It ends early when the reader disconnects.

    Every event is read from the database, so replayed and live data cannot disagree.

    Args:
        gone: returns whether the reader has disconnected.
        silence: how long nothing may happen before the stream yields None (seconds).
    """

    def __init__(
        self, queries: Queries, notifier: Notifier, gone: Callable[[], bool], silence: float = KEEPALIVE_INTERVAL
    ) -> None:
        self._queries = queries
        self._notifier = notifier
        self._gone = gone
        self._silence = silence

    def run(self, run_id: str, after: int) -> Iterator[StreamItem]:
        """Stream a run: its pending approvals, then messages and changes of approvals, and the run once it has ended.

        It ends without the run only if the service stops before the run has started.

        Args:
            after: the index after which to begin, -1 for all messages. From an index on, the approvals resolved since
                that message come first too.
        """
        yield from self._run(run_id, run_id, after)

    def session(self, session_id: str, seq: int | None, after: int) -> Iterator[StreamItem]:
        """Stream the runs of a session one after another, future runs included, until the service stops.

        Args:
            seq: of the run after which to begin; None for the first. It may be negative, for imported history.
            after: the index after which to begin in the first run.
        """
        while True:
            run = yield from self._next(session_id, partial(self._run_after, session_id, seq))
            if run is None or not (yield from self._run(session_id, run.id, after)):
                return
            seq, after = run.seq, -1

    def events(self, after: int) -> Iterator[Sequence[Event] | None]:
        """Stream the events of all runs after the event with id `after`, until the service stops."""
        while True:
            events = yield from self._next(EVENTS, partial(self._queries.events, after))
            if events is None:
                return
            yield events
            after = events[-1].id

    def _run(self, key: str, run_id: str, after: int) -> Generator[StreamItem, None, bool]:
        """Stream a run, with any key to be notified by. Return whether its end was reached."""
        snapshot = yield from self._next(key, partial(self._queries.approval_snapshot, run_id, after))
        if snapshot is None:
            return False
        yield from map(ApprovalState, snapshot.approvals)
        after_event = snapshot.through
        while True:
            batch = yield from self._next(key, partial(self._queries.next_batch, run_id, after, after_event))
            if batch is None:
                return False
            if batch.ended is not None:
                yield batch.ended
                return True
            # A message comes before the approvals that refer to it.
            if batch.messages:
                yield Messages(run_id, batch.messages)
                after = batch.messages[-1][0]
            for event_id, shown in batch.approvals:
                after_event = event_id
                yield ApprovalState(shown)

    def _run_after(self, session_id: str, seq: int | None) -> Run | None:
        return next(iter(self._queries.session_runs(session_id, limit=1, after=seq)), None)

    def _next(self, key: str, look: Callable[[], T]) -> Generator[None, None, T | None]:
        """Return the first result of `look` that is not None, yielding None after each silence until then.

        Returns: None if the reader has disconnected, or the service has stopped and nothing more will be stored.
        """
        while True:
            closed = self._notifier.closed  # before reading: everything stored by then is read
            try:
                result = self._notifier.wait(key, self._silence, look, self._gone)
            except Unavailable:
                # Outlast a database that is down for a while: a browser that gets a 503 never reconnects.
                time.sleep(POLL_INTERVAL)
                result = None
            if result is not None:
                return result
            if closed or self._gone():
                return None
            yield None
