"""The log: one line for each record, whatever it contains."""

from __future__ import annotations

import logging
import sys

from ccm.log import OneLineFormatter


def formatted(message: str, **extra: object) -> str:
    record = logging.LogRecord("ccm", logging.INFO, __file__, 1, message, None, None)
    record.__dict__.update(extra)
    return OneLineFormatter().format(record)


def test_a_message_cannot_forge_a_second_line() -> None:
    line = formatted("GET /x\r\n2026 INFO all is well \x1b[2J\u2028\x00")

    assert line.isprintable()
    assert r"GET /x\r\n2026 INFO all is well \x1b[2J\u2028\x00" in line


def test_a_stack_trace_stays_on_the_line() -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        line = formatted("it failed", exc_info=sys.exc_info())

    assert line.isprintable()
    assert "ValueError: broken" in line


def test_times_are_utc_with_milliseconds() -> None:
    assert formatted("hello", created=0.5, msecs=500.0).startswith("1970-01-01T00:00:00.500Z INFO ccm: hello")
