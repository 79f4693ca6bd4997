"""Followers of a key: one of them reads for all, and none misses or repeats anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ccm.core.storage import shared_reads
from ccm.core.storage.notifier import Notifier
from ccm.core.storage.shared_reads import Group, Part, Place, SharedReads
from tests.waiting import until

FOLLOWERS = 20


def numbers(start: Place, last: int, more: bool = False, size: int = 1) -> Part:
    """Return a part of consecutive numbers; a place is the last one that was read."""
    return Part(start, ([(number, None) for number in range(start[0] + 1, last + 1)],), size, more)


class Stored:
    """What is stored: the numbers up to `last`, of which a read returns `at_once` at most."""

    def __init__(self) -> None:
        self.notifier = Notifier()
        self.shared = SharedReads(self.notifier)
        self.last = 0
        self.at_once = 1_000
        self.size = 1
        self.reads: list[Place] = []
        self.faults: list[Exception] = []

    def add(self, count: int = 1) -> None:
        self.last += count
        self.notifier.notify(["key"])

    def read(self, place: Place) -> Part | None:
        self.reads.append(place)
        if self.faults:
            raise self.faults.pop()
        last = min(self.last, place[0] + self.at_once)
        return numbers(place, last, last < self.last, self.size) if last > place[0] else None

    def next(self, group: Group, last: int = 0, gone: Callable[[], bool] = lambda: False) -> Part | None:
        return group.next((last,), self.read, 30, gone)


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def group(stored: Stored) -> Iterator[Group]:
    with stored.shared.join("key", (0,)) as group:
        yield group


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(FOLLOWERS) as pool:
        yield pool


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses before reads, which take no time in these tests."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: pauses.append(seconds) if seconds else None)
    return pauses


def waiting(group: Group, count: int) -> Callable[[], bool]:
    """Return a function that tells whether a follower leads and `count` others wait."""
    return lambda: group._leading.locked() and len(group._waiting) == count


def test_one_follower_reads_for_all(stored: Stored, group: Group, pool: ThreadPoolExecutor) -> None:
    futures = [pool.submit(stored.next, group) for _ in range(FOLLOWERS)]
    until(waiting(group, FOLLOWERS - 1))
    stored.reads.clear()
    stored.add(3)
    parts = [future.result() for future in futures]
    assert parts[0] == numbers((0,), 3)
    assert all(part is parts[0] for part in parts)
    assert stored.reads == [(0,)]


def test_all_followers_get_everything_once_and_in_order(
    stored: Stored, pool: ThreadPoolExecutor, pauses: list[float]
) -> None:
    ends = threading.Barrier(FOLLOWERS + 1)

    def follow(number: int) -> list[Place]:
        place: Place = (number,)  # at different places
        ranges = []
        with stored.shared.join("key", place) as group:
            ends.wait()
            while place != (500,):
                part = stored.next(group, place[0])
                assert part is not None
                ranges += [part.start, part.end]
                place = part.end
        return ranges

    stored.add(FOLLOWERS)
    stored.at_once = 7
    futures: list[Future[list[Place]]] = [pool.submit(follow, number) for number in range(FOLLOWERS)]
    ends.wait()
    for _ in range(500 - FOLLOWERS):
        stored.add()
    for number, future in enumerate(futures):
        ranges = future.result()
        assert ranges[0] == (number,)
        assert ranges[1:-1:2] == ranges[2::2]
    assert stored.shared._groups == {}
    assert stored.notifier._subscribers == {}


def test_what_follows_soon_is_read_together(stored: Stored, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
            stored.add()

    monkeypatch.setattr(time, "sleep", pause)
    stored.add()
    assert stored.next(group) == numbers((0,), 1)
    assert pauses == []  # the first one is read at once
    stored.add()
    assert stored.next(group, 1) == numbers((1,), 3)
    [only] = pauses
    assert 0 < only <= shared_reads.READ_INTERVAL


def test_what_is_stored_already_is_read_without_a_pause(stored: Stored, group: Group, pauses: list[float]) -> None:
    stored.add(3)
    stored.at_once = 1
    assert [stored.next(group, last) for last in range(3)] == [
        numbers((0,), 1, more=True),
        numbers((1,), 2, more=True),
        numbers((2,), 3),
    ]
    assert pauses == []


def test_a_follower_that_is_behind_reads_by_itself_until_it_has_caught_up(
    stored: Stored, group: Group, pauses: list[float]
) -> None:
    stored.add(4)
    assert stored.next(group) == numbers((0,), 4)
    group._parts = ()
    assert stored.next(group, 2) == numbers((2,), 4)
    stored.add()
    assert stored.next(group, 4) is stored.next(group, 4)


def test_what_is_kept_for_late_followers_is_bounded(stored: Stored, group: Group, pauses: list[float]) -> None:
    for last in range(50):
        stored.add()
        stored.next(group, last)
    assert [part.end for part in group._parts] == [(last,) for last in range(51 - shared_reads.KEPT_PARTS, 51)]
    assert stored.next(group, 45) == numbers((45,), 46)
    stored.size = shared_reads.KEPT_BYTES // 2
    for last in range(50, 54):
        stored.add()
        stored.next(group, last)
    assert [part.end for part in group._parts] == [(53,), (54,)]
    stored.size = shared_reads.KEPT_BYTES * 2
    stored.add()
    stored.next(group, 54)
    assert [part.end for part in group._parts] == [(55,)]


def test_nothing_is_kept_in_silence(
    stored: Stored, group: Group, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reads, "POLL_INTERVAL", 0.01)
    stored.add()
    assert stored.next(group) is not None
    assert group._parts
    future = pool.submit(stored.next, group, 1)
    until(lambda: not group._parts)
    stored.add()
    assert future.result() == numbers((1,), 2)


def test_a_follower_that_leaves_passes_the_lead_on(
    stored: Stored, group: Group, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reads, "POLL_INTERVAL", 0.01)
    left = threading.Event()
    first = pool.submit(stored.next, group, 0, left.is_set)
    until(waiting(group, 0))
    monkeypatch.setattr(shared_reads, "POLL_INTERVAL", 30)
    second = pool.submit(stored.next, group)
    until(waiting(group, 1))
    left.set()
    stored.notifier.notify(["key"])  # brings nothing
    assert first.result() is None
    stored.add()
    assert second.result() == numbers((0,), 1)


def test_a_leader_that_is_ahead_wakes_those_for_whom_it_reads(
    stored: Stored, group: Group, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_reads, "POLL_INTERVAL", 30)
    ahead = pool.submit(stored.next, group, 5)
    until(waiting(group, 0))
    other = pool.submit(stored.next, group)
    until(waiting(group, 1))
    stored.add()
    until(other.done)
    assert not ahead.done()
    assert other.result() == numbers((0,), 1)
    stored.add(5)
    assert ahead.result() == numbers((5,), 6)


def test_a_failed_read_is_repeated_by_the_next_leader(stored: Stored, group: Group) -> None:
    stored.add()
    stored.faults = [OSError("a fault")]
    with pytest.raises(OSError, match="a fault"):
        stored.next(group)
    assert stored.next(group) == numbers((0,), 1)


def test_everything_stored_is_read_after_the_close(stored: Stored, group: Group) -> None:
    stored.last = 2  # without a notification
    stored.notifier.close()
    assert stored.next(group) == numbers((0,), 2)
    assert stored.next(group, 2) is None


def test_a_slow_client_delays_nobody(stored: Stored, group: Group, pool: ThreadPoolExecutor) -> None:
    """It holds no lock and no lead while it is busy with a part."""
    stored.add()
    slow = stored.next(group)
    assert slow is not None
    for last in range(1, 20):
        stored.add()
        fast = pool.submit(stored.next, group, last).result()
        assert fast is not None
        assert fast.end == (last + 1,)
    assert slow not in group._parts
    assert stored.next(group, 1) == numbers((1,), 20)


def test_a_missed_notification_is_made_up_for(stored: Stored, group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_reads, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(shared_reads, "RELY_INTERVAL", 0.02)
    assert group.next((0,), stored.read, 0.01, lambda: False) is None
    stored.last = 1
    assert stored.next(group) == numbers((0,), 1)
