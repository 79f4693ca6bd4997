"""Polling for tests that wait for a condition without a notification."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
POLL_INTERVAL = 0.01


def until(condition: Callable[[], T], seconds: float = 60) -> T:
    """Wait until a condition is true and return its value.

    The bound is generous because a test asserts that something happens, not how quickly.

    Raises:
        AssertionError: the condition stayed false; the message quotes it and its last value.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not true after {seconds} s: {_quoted(condition)}; it is {value!r}")
        time.sleep(POLL_INTERVAL)
    return value


def _quoted(condition: Callable[[], object]) -> str:
    """Return the source of a condition on one line."""
    try:
        return " ".join(inspect.getsource(condition).split())
    except (OSError, TypeError):
        return repr(condition)
