"""Streams of runs, sessions and events: first everything stored after a given place, then new data as it is stored."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from ccm.core.queries import Batch, Queries, Shown
from ccm.core.storage.notifier import EVENTS, POLL_INTERVAL
from ccm.core.storage.shared_reads import Place, SharedReads
from ccm.errors import Unavailable
from ccm.models import Event, Run

T = TypeVar("T")

# How long a stream stays silent before it says that nothing has happened (seconds): proxies close a connection that is
# silent for 30 or 60.
KEEPALIVE_INTERVAL = 15.0


@dataclass(frozen=True)
class Messages:
    """Messages of a run in order, each with its index. All streams at the same place yield the same object.

    Attributes:
        rendered: what the API sends, by format: rendered once for all clients.
    """

    run_id: str
    numbered: Sequence[tuple[int, str]]
    rendered: dict[str, bytes] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class ApprovalState:
    """An approval at the moment when it was requested or resolved, as the API shows it.

    It has no place in the order of the messages.
    """

    shown: Shown


# A Run means that it has ended; None means that nothing has happened for a while.
StreamItem = Messages | ApprovalState | Run | None


@dataclass(frozen=True)
class _RunPart:
    """A part of a run's stream. Its places are the index of a message and, if the run asks for approvals, an event id.

    Attributes:
        ended: the run, once it has ended; it then has no messages and approvals.
    """

    start: Place
    messages: Messages
    approvals: Sequence[tuple[int, Shown]]
    ended: Run | None
    more: bool

    @staticmethod
    def of(run_id: str, start: Place, batch: Batch) -> _RunPart:
        return _RunPart(start, Messages(run_id, batch.messages), batch.approvals, batch.ended, batch.more)

    @property
    def end(self) -> Place:
        lists = (self.messages.numbered, self.approvals)
        return tuple(items[-1][0] if items else number for number, items in zip(self.start, lists, strict=False))

    @property
    def size(self) -> int:
        return sum(len(text) for _, text in self.messages.numbered)

    def rest(self, place: Place) -> _RunPart | None:
        if place == self.start or self.ended is not None:
            return self
        messages = [message for message in self.messages.numbered if message[0] > place[0]]
        approvals = [approval for approval in self.approvals if approval[0] > place[1]]
        if not messages and not approvals:
            return None
        return _RunPart(place, Messages(self.messages.run_id, messages), approvals, None, self.more)

    def items(self) -> Iterator[StreamItem]:
        # A message comes before the approvals that refer to it.
        if self.messages.numbered:
            yield self.messages
        for _, shown in self.approvals:
            yield ApprovalState(shown)


@dataclass(frozen=True)
class _EventsPart:
    """A part of the stream of all events. Its places are the id of an event."""

    start: Place
    events: Sequence[Event]
    more: bool

    @property
    def end(self) -> Place:
        return (self.events[-1].id,)

    @property
    def size(self) -> int:
        return sum(len(event.json) for event in self.events)

    def rest(self, place: Place) -> _EventsPart | None:
        if place == self.start:
            return self
        events = [event for event in self.events if event.id > place[0]]
        return _EventsPart(place, events, self.more) if events else None


class Stream:
    """What one reader follows: everything in order, each message once. It ends early when the reader disconnects.

    Every event is read from the database, so replayed and live data cannot disagree.

    Args:
        gone: returns whether the reader has disconnected.
        silence: how long nothing may happen before the stream yields None (seconds).
    """

    def __init__(
        self, queries: Queries, shared: SharedReads, gone: Callable[[], bool], silence: float = KEEPALIVE_INTERVAL
    ) -> None:
        self._queries = queries
        self._shared = shared
        self._notifier = shared.notifier
        self._gone = gone
        self._silence = silence

    def run(self, run_id: str, after: int) -> Iterator[StreamItem]:
        """Stream a run: its pending approvals, then messages and changes of approvals, and the run once it has ended.

        It ends without the run only if the service stops before the run has started.

        Args:
            after: the index after which to begin, -1 for all messages. From an index on, the approvals resolved since
                that message come first too.
        """
        yield from self._run(run_id, after)

    def session(self, session_id: str, seq: int | None, after: int) -> Iterator[StreamItem]:
        """Stream the runs of a session one after another, future runs included, until the service stops.

        Args:
            seq: of the run after which to begin; None for the first. It may be negative, for imported history.
            after: the index after which to begin in the first run.
        """
        while True:
            run = yield from self._next(session_id, partial(self._run_after, session_id, seq))
            if run is None or not (yield from self._run(run.id, after)):
                return
            seq, after = run.seq, -1

    def events(self, after: int) -> Iterator[Sequence[Event] | None]:
        """Stream the events of all runs after the event with id `after`, until the service stops."""
        if self._gone():
            return
        place: Place = (after,)
        with self._shared.join(EVENTS, place) as group:
            while True:
                part = yield from self._repeat(partial(group.next, place, self._read_events, self._silence, self._gone))
                if part is None:
                    return
                yield part.events
                place, part = part.end, None  # many wait for long, and a part may be large

    def _run(self, run_id: str, after: int) -> Generator[StreamItem, None, bool]:
        """Stream a run. Return whether its end was reached."""
        snapshot = yield from self._next(run_id, partial(self._queries.approval_snapshot, run_id, after))
        # Never wait for a client that has left: more abandoned requests may be queued behind this one.
        if snapshot is None or self._gone():
            return False
        yield from map(ApprovalState, snapshot.approvals)
        place: Place = (after,) if snapshot.through is None else (after, snapshot.through)
        read = partial(self._read_run, run_id)
        with self._shared.join(run_id, place) as group:
            while True:
                part = yield from self._repeat(partial(group.next, place, read, self._silence, self._gone))
                if part is None:
                    return False
                if part.ended is not None:
                    yield part.ended
                    return True
                yield from part.items()
                place, part = part.end, None

    def _read_run(self, run_id: str, place: Place) -> _RunPart | None:
        batch = self._queries.next_batch(run_id, *place)
        return None if batch is None else _RunPart.of(run_id, place, batch)

    def _read_events(self, place: Place) -> _EventsPart | None:
        batch = self._queries.events(*place)
        return None if batch is None else _EventsPart(place, batch.events, batch.more)

    def _run_after(self, session_id: str, seq: int | None) -> Run | None:
        return next(iter(self._queries.session_runs(session_id, limit=1, after=seq)), None)

    def _next(self, key: str, look: Callable[[], T]) -> Generator[None, None, T | None]:
        """Return the first result of `look` that is not None, as `_repeat` does."""
        return (yield from self._repeat(partial(self._notifier.wait, key, self._silence, look, self._gone)))

    def _repeat(self, wait: Callable[[], T | None]) -> Generator[None, None, T | None]:
        """Return the first result of `wait` that is not None, yielding None after each silence until then.

        Returns: None if the reader has disconnected, or the service has stopped and nothing more will be stored.
        """
        while True:
            closed = self._notifier.closed  # before reading: everything stored by then is read
            try:
                result = wait()
            except Unavailable:
                # Outlast a database that is down for a while: a browser that gets a 503 never reconnects.
                time.sleep(POLL_INTERVAL)
                result = None
            if result is not None:
                return result
            if closed or self._gone():
                return None
            yield None
