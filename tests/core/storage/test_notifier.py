"""The notifier: who listens is woken, and only who listens."""

from __future__ import annotations

from ccm.core.storage.notifier import Notifier


def test_a_ring_wakes_those_who_listen_to_its_key() -> None:
    notifier = Notifier()
    with notifier.subscribe("a") as first, notifier.subscribe("a") as second, notifier.subscribe("b") as other:
        notifier.notify(["a", "c"])
        assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)


def test_who_has_left_leaves_nothing_behind() -> None:
    notifier = Notifier()
    with notifier.subscribe("a") as event:
        pass
    notifier.notify(["a"])

    assert not event.is_set()
    assert notifier._listeners == {}


def test_closing_wakes_everyone() -> None:
    notifier = Notifier()
    with notifier.subscribe("a") as event:
        notifier.close()
        assert event.is_set()
        assert notifier.closed
