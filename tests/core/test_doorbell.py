"""The doorbell: who listens is woken, and only who listens."""

from __future__ import annotations

from ccm.core.doorbell import Doorbell


def test_a_ring_wakes_those_who_listen_to_its_key() -> None:
    doorbell = Doorbell()
    with doorbell.listening("a") as first, doorbell.listening("a") as second, doorbell.listening("b") as other:
        doorbell.ring(["a", "c"])
        assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)


def test_who_has_left_leaves_nothing_behind() -> None:
    doorbell = Doorbell()
    with doorbell.listening("a") as event:
        pass
    doorbell.ring(["a"])

    assert not event.is_set()
    assert doorbell._listeners == {}


def test_closing_wakes_everyone() -> None:
    doorbell = Doorbell()
    with doorbell.listening("a") as event:
        doorbell.close()
        assert event.is_set()
        assert doorbell.closed
