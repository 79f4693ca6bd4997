"""Following runs: what is stored after a place, and then whatever is stored next, as long as someone reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ccm import models
from ccm.core.queries import POLL_INTERVAL, Queries, Shown
from ccm.core.storage.notifier import EVENTS
from ccm.errors import Unavailable
from ccm.models import Run

T = TypeVar("T")

# How long nothing may happen before that is said too (seconds): proxies close what is silent for 30 or 60.
KEEPALIVE_INTERVAL = 15.0


@dataclass(frozen=True)
class Messages:
    """Messages of a run in their order, each with its index."""

    run_id: str
    numbered: Sequence[tuple[int, str]]


@dataclass(frozen=True)
class ApprovalState:
    """An approval as it was when it was asked or answered, as the API shows it. It has no place in the order of the
    messages."""

    shown: Shown


# A run tells that it has ended; None, that nothing has happened for a while.
Event = Messages | ApprovalState | Run | None


class Subscription:
    """What one reader is to be sent, in order, each message once. It ends early when the reader has left.

    Every event is read from the database, so what is replayed and what is live cannot disagree.

    Args:
        gone: whether the reader has left.
        silence: how long nothing may happen before that is told (seconds).
    """

    def __init__(self, queries: Queries, gone: Callable[[], bool], silence: float = KEEPALIVE_INTERVAL) -> None:
        self._queries = queries
        self._gone = gone
        self._silence = silence

    def run(self, run_id: str, after: int) -> Iterator[Event]:
        """What a run waits for, with an index also what was resolved since that message; then the messages beyond it
        and what is asked and answered; and the run once it has ended.

        It ends without that only if the service stops before the run has begun.
        """
        yield from self._run(run_id, run_id, after)

    def session(self, session_id: str, seq: int | None, after: int) -> Iterator[Event]:
        """The runs of a session one after another, those to come as well. It ends when the service stops.

        Args:
            seq: of the run after which to begin; None for the first. It may be negative, for imported history.
            after: the index beyond which to begin in the first run.
        """
        while True:
            run = yield from self._next(session_id, partial(self._run_after, session_id, seq))
            if run is None or not (yield from self._run(session_id, run.id, after)):
                return
            seq, after = run.seq, -1

    def events(self, after: int) -> Iterator[Sequence[models.Event] | None]:
        """What happens to all runs, beyond the event with id `after`. It ends when the service stops."""
        while True:
            found = yield from self._next(EVENTS, partial(self._queries.events, after))
            if found is None:
                return
            yield found
            after = found[-1].id

    def _run(self, key: str, run_id: str, after: int) -> Generator[Event, None, bool]:
        """The same for one run, heard of by any key. True if its end was told."""
        asked = yield from self._next(key, partial(self._queries.asked, run_id, after))
        if asked is None:
            return False
        yield from map(ApprovalState, asked.approvals)
        event = asked.through
        while True:
            news = yield from self._next(key, partial(self._queries.news, run_id, after, event))
            if news is None:
                return False
            if news.ended is not None:
                yield news.ended
                return True
            # Before the question the message that it is about.
            if news.messages:
                yield Messages(run_id, news.messages)
                after = news.messages[-1][0]
            for change in news.approvals:
                event, shown = change
                yield ApprovalState(shown)

    def _run_after(self, session_id: str, seq: int | None) -> Run | None:
        return next(iter(self._queries.session_runs(session_id, limit=1, after=seq)), None)

    def _next(self, key: str, look: Callable[[], T]) -> Generator[None, None, T | None]:
        """What `look` finds, as soon as it does, and a None for each silence until then; None if it never will."""
        while True:
            complete = self._queries.complete  # asked first: what is read after it is all that there will be
            try:
                found = self._queries.wait(key, self._silence, look, self._gone)
            except Unavailable:
                # It outlasts a database that is away for a while: a browser that is answered 503 gives up for good.
                time.sleep(POLL_INTERVAL)
                found = None
            if found is not None:
                return found
            if complete or self._gone():
                return None
            yield None
