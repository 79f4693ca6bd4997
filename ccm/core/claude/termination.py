"""Ends one Claude Code process: lets it exit by itself if possible, else forces it in steps, each with a time limit."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from ccm.core.claude.outcome import Progress
from ccm.core.claude.processes import end_marked
from ccm.core.claude.run_events import RunEvents, first
from ccm.core.claude.sdk import Client
from ccm.core.run_log import RunLog

log = logging.getLogger(__name__)

# Time that each step may take before the next, harsher one (seconds).
INTERRUPT_TIMEOUT = 3.0
CLOSE_TIMEOUT = 5.0
TERMINATE_TIMEOUT = 5.0
# How long the output may stay open after Claude Code has exited (seconds).
EXIT_DELAY = 0.3
# How long to wait for the end of a stream while nothing is being stored (seconds). After that the SDK counts as failed.
SILENT_TIMEOUT = 40.0
# How often Claude Code is killed before the run gives up on it.
KILL_TRIES = 10
# How often to check whether the process has been started (seconds).
SPAWN_INTERVAL = 0.02
# How often a run checks whether it is to stop, in case the notification was lost (seconds).
STOP_CHECK_INTERVAL = 1.0


class Termination:
    """Waits until a run is over or must stop, then ends its Claude Code.

    It does not read Claude Code's output; the run's reader does, until the stream ends.

    Args:
        run_id: the mark of the run's processes.
        events: shared with the run's other tasks.
        progress: is told when a run that is not over is about to be stopped.
        stop_requested: whether a reason to stop has been given.

    Attributes:
        recording: the reader is waiting for a message to be stored.
    """

    def __init__(
        self,
        run_id: str,
        events: RunEvents,
        progress: Progress,
        *,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._run_id = run_id
        self._events = events
        self._progress = progress
        self._stop_requested = stop_requested
        self.recording = False
        # When some output was last being stored.
        self._last_activity = time.monotonic()

    def note_recorded(self) -> None:
        """Note that the reader's message was stored just now."""
        self.recording = False
        if not self._events.exited.is_set():  # after that, the output may be another process's
            self._last_activity = time.monotonic()

    async def run(self, client: Client) -> None:
        """Return once the stream has ended, or once waiting longer is pointless."""
        events = self._events
        await self._reach_the_end()
        if events.exited.is_set() and not events.connected.is_set():
            # The SDK waits for an answer that will never come, unless it has noticed the exit itself.
            await events.stream_ends_within(CLOSE_TIMEOUT)
            return
        if events.stop.is_set() and not events.over.is_set():
            self._progress.note_stop()
            # The interrupt needs a reader: it would hang while the reader waits for storage.
            if events.connected.is_set() and not self.recording:
                with suppress(Exception):
                    async with asyncio.timeout(INTERRUPT_TIMEOUT):
                        await client.interrupt()
                        await first(events.over, events.stream_ended)
        if events.over.is_set():
            # Bounded, because a message that Claude Code does not read blocks the input.
            with suppress(Exception):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await client.end_input()
        if (events.over.is_set() or events.exited.is_set()) and await self._closes():
            return
        await self._terminate_or_kill(client)

    async def watch_exit(self, client: Client) -> None:
        """Free the output when Claude Code has exited: a tool that holds it open would prevent the run's end."""
        events = self._events
        while not (events.connected.is_set() or client.is_started):
            await asyncio.sleep(SPAWN_INTERVAL)
        code = await client.wait_for_exit()
        events.exited.set()
        if not await events.stream_ends_within(EXIT_DELAY):
            await self._free_output(client, cut_off=code != 0 and not events.over.is_set())

    async def kill_after_fault(self, client: Client) -> None:
        """Kill Claude Code and its tools until the stream ends, because `run` has failed.

        Blocks the loop, which has nothing else to do, so no thread is needed.
        """
        for _ in range(KILL_TRIES):
            if self._events.stream_ended.is_set():
                return
            try:
                client.signal(signal.SIGKILL)
                end_marked(self._run_id)
                await self._events.stream_ends_within(EXIT_DELAY)
            except Exception:
                RunLog(log, self._run_id).exception("cannot kill Claude Code", event="kill_failed")
                await asyncio.sleep(EXIT_DELAY)

    async def _terminate_or_kill(self, client: Client) -> None:
        events = self._events
        while not events.stream_ended.is_set() and self._silence() < SILENT_TIMEOUT:
            client.signal(signal.SIGTERM)
            if await events.stream_ends_within(TERMINATE_TIMEOUT):
                return
            client.signal(signal.SIGKILL)
            await self._free_output(client, cut_off=False)
            if await events.stream_ends_within(TERMINATE_TIMEOUT):
                return
            if events.stop.is_set() and events.exited.is_set() and self._silence() > CLOSE_TIMEOUT:
                # A process without the run's mark holds the output, or the SDK has failed. A stopped run waits for
                # neither.
                return

    async def _reach_the_end(self) -> None:
        """Return when the run is over, must stop, or has lost Claude Code."""
        events = self._events
        while not events.ending:
            await first(events.over, events.stop, events.stream_ended, events.exited, within=STOP_CHECK_INTERVAL)
            if self._stop_requested():
                events.stop.set()

    async def _free_output(self, client: Client, cut_off: bool) -> None:
        """End the processes that hold the output open after Claude Code has exited.

        All processes of the run end if it was stopped or cut off. Otherwise only those that hold the output: the stream
        may be open only because storage is slow, and background processes that an agent leaves behind keep running.
        """
        everything = cut_off or self._events.stop.is_set()
        await asyncio.to_thread(end_marked, self._run_id, holding=None if everything else client.output())

    async def _closes(self) -> bool:
        """Return whether the stream ends without force. Claude Code gets CLOSE_TIMEOUT, storage as long as it needs."""
        events = self._events
        while not await events.stream_ends_within(CLOSE_TIMEOUT):
            waits = self.recording or (events.exited.is_set() and self._silence() < SILENT_TIMEOUT)
            if events.stop.is_set() or not waits:
                return False
        return True

    def _silence(self) -> float:
        """Return the seconds since any output was last being stored."""
        if self.recording:
            self._last_activity = time.monotonic()
        return time.monotonic() - self._last_activity
