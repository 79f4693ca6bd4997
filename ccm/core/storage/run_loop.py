"""Waits in a run's event loop for another thread, such as the writer's."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

# How often a waiting run checks whether the wait is over, in case the notification was lost (seconds).
POLL_INTERVAL = 1.0


async def result_of(future: Future[T]) -> T:
    """Wait for a future that another thread completes, and return its result or raise its exception.

    Unlike asyncio.wrap_future, cancelling the wait does not cancel what is waited for, such as a write.
    """
    loop = asyncio.get_running_loop()
    done = asyncio.Event()

    def wake(_: Future[T]) -> None:
        with suppress(RuntimeError):  # the run has ended meanwhile, and its loop is closed
            loop.call_soon_threadsafe(done.set)

    future.add_done_callback(wake)
    while not future.done():
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_INTERVAL):
                await done.wait()
    return future.result()
