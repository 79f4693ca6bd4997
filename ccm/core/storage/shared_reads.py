"""Reads that followers share: one of them reads the database, and all that are at the same place get the same part.

A place says how much a follower has read: an index or id for each kind of data that it follows. At any time one waiting
follower of a group leads. Only the leader is woken by notifications. It reads on from the group's place, READ_INTERVAL
after the last read at the earliest, and wakes the others. A follower that is behind reads by itself until it has caught
up with the group, so nobody waits for a slow client.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ccm.core.storage.notifier import POLL_INTERVAL, RELY_INTERVAL, Notifier
from ccm.models import Run

Place = tuple[int, ...]

# How long a group waits after a read before it reads again (seconds), and how long for each of its followers, because
# waking them costs more than the read. The first data after a longer silence is read at once. Under load more data
# comes with each read, instead of more reads.
READ_INTERVAL = 0.05
WAKE_INTERVAL = 0.002
# How many parts a group keeps for followers that come back from sending late, and their bytes: none but the newest may
# exceed them. None is kept once a leader has waited for POLL_INTERVAL in vain.
KEPT_PARTS = 8
KEPT_BYTES = 2**18


@dataclass(frozen=True)
class Part:
    """What was read after a place. All followers at the same place get the same part.

    Attributes:
        start: the place.
        lists: for each number of the place, what follows it: in order, each item with its own number.
        size: roughly, in bytes.
        more: more was stored already when it was read.
        ended: the run, once it has ended and everything before its end has been read; the lists are then empty.
        rendered: what the API sends, by format: rendered once for all followers.
    """

    start: Place
    lists: tuple[Sequence[tuple[int, Any]], ...]
    size: int = 0
    more: bool = False
    ended: Run | None = None
    rendered: dict[str, bytes] = field(default_factory=dict, compare=False)

    @property
    def end(self) -> Place:
        """The place after it."""
        return tuple(items[-1][0] if items else number for number, items in zip(self.start, self.lists, strict=True))

    def rest(self, place: Place) -> Part | None:
        """Return what follows a later place: itself at its start, None if nothing does."""
        if place == self.start or self.ended is not None:
            return self
        lists = tuple(
            [item for item in items if item[0] > number] for number, items in zip(place, self.lists, strict=True)
        )
        return Part(place, lists, self.size, self.more) if any(lists) else None


# Reads what is stored after a place; None if there is nothing yet.
Read = Callable[[Place], Part | None]


def is_before(place: Place, other: Place) -> bool:
    """Return whether something between two places is missing at the first one."""
    return any(here < there for here, there in zip(place, other, strict=True))


class Group:
    """The followers of one key.

    Args:
        place: that of the first follower.
        notified: set by each notification of the key. If it is not set, nothing is stored beyond the group's place.
    """

    def __init__(self, place: Place, notified: threading.Event, notifier: Notifier) -> None:
        self.followers = 0
        self._place = place
        self._notified = notified
        self._notifier = notifier
        self._leading = threading.Lock()
        # Replaced and never changed, because all followers read it without a lock. The oldest comes first.
        self._parts: tuple[Part, ...] = ()
        # When the group last read, and when it may read again, as `time.monotonic()`.
        self._last_read = self._next_read = 0.0
        self._lock = threading.Lock()
        # A lock for each waiting follower that does not lead.
        self._waiting: set[threading.Lock] = set()
        notified.set()  # nothing has been read yet

    def next(self, place: Place, read: Read, seconds: float, gone: Callable[[], bool]) -> Part | None:
        """Return what follows a place, as soon as there is something.

        Args:
            read: reads what is stored after a place. What it raises is raised here.
            seconds: when to return None instead. Closing the notifier has the same effect.
            gone: returns whether the client has disconnected, which also ends the wait.
        """
        deadline = time.monotonic() + seconds
        while True:
            # Released once to wake this follower. A lock is the cheapest thing to wait for.
            woken = threading.Lock()
            woken.acquire()
            with self._lock:
                self._waiting.add(woken)  # before looking, so that no part is missed
            try:
                is_behind = is_before(place, self._place)
                part = self._find(place)
                if part is None and (is_behind or self._notifier.closed):
                    part = read(place)
                if part is not None or self._notifier.closed:
                    return part
                if self._leading.acquire(blocking=False):
                    with self._lock:
                        self._waiting.discard(woken)
                    return self._lead(place, read, deadline, gone)
                remaining = deadline - time.monotonic()
                # The client is not checked at each part: if it has left, the next one cannot be sent.
                if remaining <= 0 or (not woken.acquire(timeout=min(POLL_INTERVAL, remaining)) and gone()):
                    return None
            finally:
                with self._lock:
                    self._waiting.discard(woken)

    def _find(self, place: Place) -> Part | None:
        """Return what follows a place in the parts that are kept."""
        for part in self._parts:
            if not is_before(place, part.start) and (rest := part.rest(place)) is not None:
                return rest
        return None

    def _lead(self, place: Place, read: Read, deadline: float, gone: Callable[[], bool]) -> Part | None:
        """Read for all followers until there is something for this one. Then leave the lead to another one."""
        part = None
        try:
            while True:
                # Another leader may have read it since this follower looked.
                part = self._find(place)
                now = time.monotonic()
                if part is not None or now >= deadline or self._notifier.closed or gone():
                    return part
                if self._notified.wait(min(POLL_INTERVAL, deadline - now)):
                    time.sleep(max(0.0, self._next_read - time.monotonic()))
                    self._read(read)
                elif time.monotonic() >= self._last_read + RELY_INTERVAL:
                    self._read(read)
                else:
                    self._parts = ()
        finally:
            self._leading.release()
            # Without a part for them the others sleep on, except the next leader.
            self._wake(1 if part is None else None)

    def _read(self, read: Read) -> None:
        """Read on from the group's place, for all."""
        self._notified.clear()
        self._last_read = time.monotonic()
        try:
            part = read(self._place)
        except BaseException:
            self._notified.set()  # for the next leader
            raise
        if part is None:
            return
        if part.more:
            self._notified.set()
        else:
            self._next_read = self._last_read + max(READ_INTERVAL, self.followers * WAKE_INTERVAL)
        kept, size = [part], part.size
        for older in reversed(self._parts[-KEPT_PARTS + 1 :]):
            size += older.size
            if size > KEPT_BYTES:
                break
            kept.insert(0, older)
        self._parts = tuple(kept)
        self._place = part.end
        self._wake(None)

    def _wake(self, count: int | None) -> None:
        """Wake some of the waiting followers, or all."""
        with self._lock:
            for woken in list(self._waiting)[:count]:
                self._waiting.discard(woken)
                woken.release()


class SharedReads:
    """The groups of followers, by key. A group, with the parts that it keeps, lasts as long as it has followers."""

    def __init__(self, notifier: Notifier) -> None:
        self.notifier = notifier
        self._lock = threading.Lock()
        self._groups: dict[str, tuple[Group, ExitStack]] = {}

    @contextmanager
    def join(self, key: str, place: Place) -> Iterator[Group]:
        """Be one of the followers of a key, beginning at a place. All followers of a key must read the same kind."""
        with self._lock:
            if key not in self._groups:
                stack = ExitStack()
                notified = stack.enter_context(self.notifier.subscribe(key))
                self._groups[key] = Group(place, notified, self.notifier), stack
            group, _ = self._groups[key]
            group.followers += 1
        try:
            yield group
        finally:
            with self._lock:
                group.followers -= 1
                if not group.followers:
                    _, stack = self._groups.pop(key)
                    stack.close()
