"""One run of Claude Code, from its start to its end, as a stream of raw message dicts."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import sniffio

from ccm.core.claude import termination
from ccm.core.claude.input_queue import FollowUp, InputQueue, being_started, run_ending
from ccm.core.claude.launch import launch
from ccm.core.claude.outcome import LOGIN_ADVICE, Outcome, Progress, cost, fault
from ccm.core.claude.prestarted import Prestarted
from ccm.core.claude.processes import end_marked
from ccm.core.claude.run_clock import RunClock
from ccm.core.claude.run_context import Ask, CLIConfig, RunContext, Transcript, user_message
from ccm.core.claude.run_directory import new_run_directory, read_stderr, remove_run_directory
from ccm.core.claude.run_events import RunEvents, first
from ccm.core.claude.sdk import Client, explain
from ccm.core.claude.sdk_options import UnusableOptionsError, sdk_options
from ccm.core.run_log import RunLog
from ccm.json_text import to_json_text
from ccm.models import Answer, Question, RunErrorCode, RunStatus

log = logging.getLogger(__name__)

# How much may be read from the output after Claude Code has exited, in addition to one message. A pipe holds no more,
# so the rest comes from another process that has the output open.
PIPE_BYTES = 2**20
# How long an idle Claude Code may leave a message unanswered (seconds). After that the run is over anyway.
SETTLE_TIMEOUT = 10.0
# When the transcript of a run without a result is first copied; the delay then doubles up to the interval (seconds).
FIRST_COPY_DELAY = 1.0
COPY_INTERVAL = 60.0
TMPDIR_ADVICE = (
    "Cannot write to the directory for the run's temporary files: {}. Free space in TMPDIR, or set TMPDIR to another "
    "directory, and start the run again."
)


class ForeignOutputError(Exception):
    """The output that is read was not written by Claude Code."""


class Execution:
    """One run from its start to its end.

    `run` is called once. `send` and `stop` may be called from any thread at any time.

    Args:
        record: stores a message and returns its index. Called in the run's own loop; the agent waits while it waits.
        transcript: is told when to copy the transcript. Without it nothing is copied during the run.
        ask: returns the answer to a permission request, in the run's own loop. Without one Claude Code does not ask.
        prestarted: a Claude Code that was started before, for this run's ids.
    """

    def __init__(
        self,
        context: RunContext,
        cli_config: CLIConfig,
        record: Callable[[dict[str, Any]], Awaitable[int]],
        transcript: Transcript | None = None,
        *,
        ask: Ask | None = None,
        prestarted: Prestarted | None = None,
    ) -> None:
        self._prestarted = prestarted
        self._log = RunLog(log, context.run_id)
        self._transcript = transcript
        self._ask = None if ask is None else partial(self._ask_and_wait, ask)
        self._context = context
        self._cli_config = cli_config
        self._record = record
        self._time_limit = cli_config.ceilings.time_limit(context.timeout_ms)
        self._clock = RunClock(self._time_limit.seconds)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._events = RunEvents()
        self._progress = Progress()
        self._termination = termination.Termination(
            context.run_id, self._events, self._progress, stop_requested=lambda: self._reason is not None
        )
        self._bytes_after_exit = 0
        self._prompt = user_message(context.sdk_session_id, context.prompt, context.images)
        self._follow_ups = InputQueue(
            self._prompt, self._record_message, self._events, cli_config.max_message_bytes, self._log
        )
        self._settling: asyncio.TimerHandle | None = None
        # Why the run stops. The first reason counts.
        self._reason: Outcome | None = None
        self._disconnect_failed = False
        # Whether every process of the run has ended, except those that may remain.
        self.processes_ended = False

    # ---- from any thread

    def send(self, follow_up: FollowUp) -> None:
        """Send a user's message to Claude Code. `follow_up.taken_in` tells whether it was accepted."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._follow_ups.admit, follow_up)
            elif self._events.over.is_set() or self._events.stream_ended.is_set():
                follow_up.refuse(run_ending())
            else:
                follow_up.refuse(being_started())

    def stop(self, reason: Outcome) -> None:
        """Stop the run; it ends with `reason` unless it is over before. The first reason counts."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.stop.set)

    # ---- in the run's thread

    def run(self) -> Outcome:
        """Run Claude Code in this thread's own event loop and return how the run ended.

        Its processes have ended then, unless `processes_ended` is False.
        """
        started = time.monotonic()
        with ExitStack() as stack:
            stack.callback(self._end_processes)
            if self._prestarted is not None:
                stack.callback(self._prestarted.end, 0.0)
            outcome = asyncio.run(self._run())
        results = self._progress.results
        return replace(
            outcome,
            result=results[-1] if results else None,
            cost_usd=cost(results, fresh=self._context.resume is None),
            duration_ms=round((time.monotonic() - started) * 1000),
        )

    def _end_processes(self) -> None:
        """End the processes of the run that did not end by themselves."""
        try:
            if self._reason is not None or self._disconnect_failed or not self._events.over.is_set():
                end_marked(self._context.run_id)
            self.processes_ended = True
        except Exception:
            self._log.exception("cannot find its processes", event="process_search_failed")

    async def _run(self) -> Outcome:
        # The SDK uses anyio, which detects the kind of event loop several times per message. Setting it saves that.
        sniffio.current_async_library_cvar.set("asyncio")
        with self._lock:
            self._loop = asyncio.get_running_loop()
            if self._reason is not None:
                self._events.stop.set()
        timekeeper = asyncio.create_task(self._supervised(self._keep_time))
        copying = asyncio.create_task(self._supervised(self._copy_transcript))
        try:
            return await self._run_claude()
        finally:
            timekeeper.cancel()
            copying.cancel()
            self._events.stream_ended.set()
            with self._lock:
                self._loop = None
            self._follow_ups.close()

    async def _run_claude(self) -> Outcome:
        missing = self._cli_config.missing()
        if missing is not None:
            return Outcome(RunStatus.ERROR, RunErrorCode.CLI_NOT_FOUND, missing)
        if not Path(self._context.cwd).is_dir():
            gone = f"The directory {self._context.cwd} no longer exists."
            return Outcome(RunStatus.ERROR, RunErrorCode.CWD_NOT_FOUND, gone)
        if self._prestarted is not None:
            client = await self._prestarted.take_over(self._context, self._cli_config, self._ask, self._events.stop)
            if client is not None:
                return self._outcome(await self._converse(client), read_stderr(self._prestarted.directory))
            if self._events.stop.is_set():
                return self._outcome(None, "")
        with ExitStack() as stack:
            try:
                directory = new_run_directory(self._context.run_id)
                stack.callback(remove_run_directory, directory)
                options = sdk_options(self._context, self._cli_config, directory, ask=self._ask)
            except UnusableOptionsError as unusable:
                return Outcome(RunStatus.ERROR, RunErrorCode.OPTIONS_UNUSABLE, str(unusable))
            except OSError as error:
                self._log.error("cannot write its temporary directory: %s", error, event="run_directory_failed")
                return Outcome(RunStatus.ERROR, RunErrorCode.TMPDIR_NOT_WRITABLE, TMPDIR_ADVICE.format(error.strerror))
            raised = await self._converse(Client.launching(options, launch(self._cli_config, directory)))
            return self._outcome(raised, read_stderr(directory))

    async def _converse(self, client: Client) -> BaseException | None:
        """Start Claude Code, read its messages, and end it. Returns the exception that the SDK raised, if any."""
        # Not cancelled before the stream has ended: a cancelled disconnect leaks Claude Code and its tools.
        conversation = asyncio.create_task(self._receive(client))
        try:
            # Without this, the run would wait for ever for a task that failed before it set `stream_ended`.
            conversation.add_done_callback(self._set_stream_ended)
            keeper = asyncio.create_task(self._supervised(partial(self._end, client)))
            await asyncio.wait((keeper,))
        except BaseException:
            conversation.cancel()  # otherwise it would start Claude Code when the run has failed already
            raise
        if not conversation.done():
            # The processes have ended, but the SDK has not noticed it.
            conversation.cancel()
            await asyncio.wait((conversation,), timeout=termination.CLOSE_TIMEOUT)
        await self._disconnect(client)
        return None if conversation.cancelled() or not conversation.done() else conversation.exception()

    def _set_stream_ended(self, _conversation: asyncio.Task[None]) -> None:
        try:
            self._events.stream_ended.set()
        except Exception:
            self._log.exception("cannot note the end of its stream", event="stream_end_failed")

    async def _receive(self, client: Client) -> None:
        sending: asyncio.Task[None] | None = None
        try:
            if not client.is_connected:
                await client.connect()
            self._events.connected.set()
            if not self._events.stop.is_set():
                sending = asyncio.create_task(self._supervised(partial(self._write_input, client)))
                await client.receive_raw(self._handle_message)
        finally:
            self._events.stream_ended.set()
            if sending is not None:
                sending.cancel()

    async def _end(self, client: Client) -> None:
        """End Claude Code. If that fails, kill it, because nothing else would end it."""
        try:
            exit_watch = asyncio.create_task(self._supervised(partial(self._termination.watch_exit, client)))
            try:
                await self._termination.run(client)
            finally:
                exit_watch.cancel()
        except Exception as error:
            self._fail_with(error)
            await self._termination.kill_after_fault(client)

    async def _supervised(self, part: Callable[[], Awaitable[None]]) -> None:
        """Run a background task. If it fails, the run stops, because otherwise it might never end."""
        try:
            await part()
        except Exception as error:
            self._fail_with(error)

    def _fail(self, code: RunErrorCode, message: str) -> None:
        self.stop(Outcome(RunStatus.ERROR, code, message))

    def _fail_with(self, error: Exception) -> None:
        """Stop the run after a fault in one of its tasks. For the run's own loop."""
        self._log.error("failed because of a fault", exc_info=error, event="run_failed")
        if self._reason is None:
            self._reason = fault(error)
        self._events.stop.set()

    async def _keep_time(self) -> None:
        """Stop the run when its time is used up, unless it is ending already."""
        await self._clock.run_out()
        if not self._events.ending:
            self._fail(RunErrorCode.TIMEOUT, self._time_limit.message)

    async def _copy_transcript(self) -> None:
        """Copy the transcript from time to time, and at a result, while Claude Code waits or exits.

        What it writes after the last copy is copied after the end of the run.
        """
        if self._transcript is None:
            return
        delay = FIRST_COPY_DELAY
        while not self._events.stream_ended.is_set():
            await first(self._events.result, self._events.stream_ended, within=delay)
            at_result = self._events.result.is_set()
            self._events.result.clear()
            delay = min(2 * delay, COPY_INTERVAL)
            if not self._events.stream_ended.is_set():
                await self._transcript.copy(at_result)

    async def _disconnect(self, client: Client) -> None:
        try:
            await client.disconnect()
        except Exception:
            # The run is over and its outcome is known. Remaining processes are ended by their mark.
            self._log.exception("cannot disconnect from Claude Code", event="disconnect_failed")
            self._disconnect_failed = True

    async def _write_input(self, client: Client) -> None:
        """Write the prompt and the later messages in order. Only this task waits if Claude Code reads slowly."""
        try:
            await client.query(self._follow_ups.messages())
        except Exception as error:
            # If Claude Code is exiting, its last messages and its exit give a better reason.
            if not await self._events.stream_ends_within(termination.CLOSE_TIMEOUT) and not self._events.ending:
                self._fail(RunErrorCode.CLI_CRASHED, f"Claude Code no longer accepts input: {error}")

    # ---- output

    async def _handle_message(self, message: dict[str, Any]) -> None:
        if message.get("command_uuid") == self._prompt["uuid"]:
            return  # the prompt's replay and its result say the same
        if self._events.exited.is_set():
            self._check_source(message)
        if self._settling is not None:
            self._settling.cancel()
        kind, subtype = message.get("type"), message.get("subtype")
        if kind == "system" and subtype == "session_state_changed":
            pass  # only this service enables these messages; clients do not get them
        elif not await self._follow_ups.handle(message):
            await self._record_message(message)
        self._progress.note(message)
        if kind == "result":
            self._events.result.set()
        if self._progress.login_refused:
            self._fail(RunErrorCode.AUTHENTICATION_FAILED, LOGIN_ADVICE)
        if self._progress.idle:
            if not self._follow_ups.in_flight:
                self._events.over.set()
            elif self._progress.reports_idle or kind == "result":
                # Idle although a message was sent: either the message gets a turn soon, or Claude Code has missed it.
                self._settling = asyncio.get_running_loop().call_later(SETTLE_TIMEOUT, self._events.over.set)

    def _check_source(self, message: dict[str, Any]) -> None:
        """Check that a message read after the exit of Claude Code can be its own.

        Raises:
            ForeignOutputError: more was read after the exit than Claude Code can have written.
        """
        self._bytes_after_exit += len(to_json_text(message))
        if self._bytes_after_exit > PIPE_BYTES + self._cli_config.max_message_bytes:
            raise ForeignOutputError("another process is writing to the output of Claude Code, which has exited")

    async def _record_message(self, message: dict[str, Any]) -> int:
        self._termination.recording = True
        try:
            return await self._record(message)
        finally:
            self._termination.note_recorded()

    async def _ask_and_wait(self, ask: Ask, question: Question) -> Answer:
        """Return the answer to a permission request. The wait does not count towards the run's time limit."""
        asking = asyncio.ensure_future(ask(question))
        stop = asyncio.create_task(self._events.stop.wait())
        try:
            with self._clock.paused():
                await asyncio.wait((asking, stop), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                # The run is stopping: the approval expires, and Claude Code must not continue with an answer.
                asking.cancel()
                await self._events.stream_ended.wait()
                raise asyncio.CancelledError  # as if Claude Code had withdrawn its request: nothing reads an answer
        finally:
            asking.cancel()
            stop.cancel()
        answer = asking.result()
        if answer.interrupt:
            self._progress.note_denial(answer)
        return answer

    def _outcome(self, error: BaseException | None, stderr: str) -> Outcome:
        """Return how the run ended.

        Args:
            error: the exception that the SDK raised, if any.
            stderr: the end of Claude Code's stderr.
        """
        outcome = self._progress.outcome(
            self._reason, over=self._events.over.is_set(), unanswered=self._follow_ups.unanswered
        )
        if outcome is not None:
            return outcome
        code, message = explain(error, stderr, self._cli_config.max_message_bytes)
        if code == RunErrorCode.EXECUTION_ERROR:
            self._log.error("%r", error, exc_info=error, event="run_failed")
        return Outcome(RunStatus.ERROR, code, message)
