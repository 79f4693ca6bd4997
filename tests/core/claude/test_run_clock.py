"""The clock of a run: its limit and its pauses."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from ccm.core.claude.run_clock import RunClock


async def runs_out_within(clock: RunClock, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await clock.run_out()
    except TimeoutError:
        return False
    return True


def test_the_clock_runs_out_after_its_time_and_not_before() -> None:
    async def measure() -> float:
        begun = time.monotonic()
        assert await runs_out_within(RunClock(0.1), 30)
        return time.monotonic() - begun

    assert asyncio.run(measure()) >= 0.1


def test_the_clock_starts_when_it_is_created() -> None:
    clock = RunClock(0)
    assert clock.left <= 0
    assert asyncio.run(runs_out_within(clock, 30))


def test_a_clock_without_a_limit_never_runs_out() -> None:
    clock = RunClock(math.inf)
    assert not asyncio.run(runs_out_within(clock, 0.05))
    assert clock.left == math.inf


def test_a_pause_does_not_count() -> None:
    async def pause() -> None:
        clock = RunClock(0.1)
        with clock.paused():
            left = clock.left
            assert not await runs_out_within(clock, 0.2)
            assert clock.left == left > 0
        assert await runs_out_within(clock, 30)

    asyncio.run(pause())


def test_the_remaining_time_is_the_same_after_a_pause() -> None:
    async def pause() -> None:
        begun = time.monotonic()
        clock = RunClock(60)
        with clock.paused():
            paused = time.monotonic()
            assert not await runs_out_within(clock, 0.2)
            pause = time.monotonic() - paused
        assert 60 - clock.left <= time.monotonic() - begun - pause

    asyncio.run(pause())


def test_a_pause_delays_a_task_that_is_already_waiting() -> None:
    async def pause() -> None:
        clock = RunClock(0.1)
        waiting = asyncio.create_task(clock.run_out())
        await asyncio.sleep(0)
        with clock.paused():
            assert (await asyncio.wait({waiting}, timeout=0.2))[0] == set()
        async with asyncio.timeout(30):
            await waiting
        assert clock.left <= 0

    asyncio.run(pause())


def test_overlapping_pauses_end_with_the_last() -> None:
    async def pause() -> None:
        clock = RunClock(0.1)
        with clock.paused():
            with clock.paused():
                pass
            assert not await runs_out_within(clock, 0.2)
            assert clock.left > 0
        assert await runs_out_within(clock, 30)

    asyncio.run(pause())


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError])
def test_a_pause_ends_if_its_block_raises(error: type[BaseException]) -> None:
    clock = RunClock(0)
    with pytest.raises(error), clock.paused():
        raise error
    assert asyncio.run(runs_out_within(clock, 30))
