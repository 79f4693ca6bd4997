"""The notifier wakes the subscribers of a key, and no others."""

from __future__ import annotations

from ccm.core.storage.notifier import Notifier


def test_a_notification_wakes_the_subscribers_of_its_key() -> None:
    notifier = Notifier()
    with notifier.subscribe("a") as first, notifier.subscribe("a") as second, notifier.subscribe("b") as other:
        notifier.notify(["a", "c"])
        assert (first.is_set(), second.is_set(), other.is_set()) == (True, True, False)


def test_a_subscription_that_ends_leaves_nothing_behind() -> None:
    notifier = Notifier()
    with notifier.subscribe("a") as event:
        pass
    notifier.notify(["a"])

    assert not event.is_set()
    assert notifier._subscribers == {}


def test_closing_wakes_all_subscribers() -> None:
    notifier = Notifier()
    with notifier.subscribe("a") as event:
        notifier.close()
        assert event.is_set()
        assert notifier.closed
