"""The events of one Claude Code process, which the tasks of its run share."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field


@dataclass
class RunEvents:
    """The events of a run, set in its own event loop only.

    Attributes:
        connected: Claude Code has answered the SDK's first request.
        stop: the run must end early.
        result: Claude Code has ended a turn; cleared when the transcript is copied.
        over: Claude Code has done everything that it was asked to do.
        exited: its process has exited.
        stream_ended: nothing more will be read from it.
    """

    connected: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    result: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    stream_ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ending(self) -> bool:
        """Whether the run takes no more messages."""
        return any(event.is_set() for event in (self.over, self.stop, self.exited, self.stream_ended))

    async def stream_ends_within(self, seconds: float) -> bool:
        """Wait for the end of the stream. Returns False if `seconds` passed first."""
        await first(self.stream_ended, within=seconds)
        return self.stream_ended.is_set()


async def first(*events: asyncio.Event, within: float | None = None) -> None:
    """Wait until one of the events is set, or until `within` seconds have passed."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
