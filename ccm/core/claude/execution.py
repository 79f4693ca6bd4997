"""One run of Claude Code, from its start to its end, as a stream of raw message dicts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import sniffio

from ccm.core.claude.input_queue import REPLAY_BYTES, FollowUp, InputQueue, being_started
from ccm.core.claude.options import UnusableOptionsError, sdk_options
from ccm.core.claude.outcome import Outcome, cost, error_code, error_text
from ccm.core.claude.processes import end_marked
from ccm.core.claude.run_clock import RunClock
from ccm.core.claude.run_context import Ask, CLIConfig, RunContext
from ccm.core.claude.run_directory import run_directory, said_on_stderr
from ccm.core.claude.sdk import Client, explain
from ccm.core.transcripts.store import Mirror
from ccm.errors import NotTakenIn, RunEnding, TooLarge
from ccm.json_text import to_json_text
from ccm.models import Answer, Question, RunStatus

log = logging.getLogger(__name__)

# Seconds that each step of ending a run may take before the next, harsher one.
INTERRUPT_TIMEOUT = 3.0
CLOSE_TIMEOUT = 5.0
TERMINATE_TIMEOUT = 5.0
# How long the output of a CLI that has gone may stay open.
EXIT_DELAY = 0.3
# How long a stream that should end is waited for with nothing on its way to storage: the SDK itself may have failed.
SILENT_TIMEOUT = 40.0
# How often a CLI is killed that does not go.
KILL_TRIES = 10
# How often it is looked whether the CLI has been started (seconds).
SPAWN_INTERVAL = 0.02
# How much may be read from the output of a CLI that has gone, beside one message: a pipe holds no more. The rest is
# somebody else's who has it open.
PIPE_BYTES = 2**20
# How often a run looks whether it is to stop, should it not have been told (seconds).
REASON_INTERVAL = 1.0
# How long a CLI that is otherwise done may say nothing of a message that it was sent, before it is let go all the same.
SETTLE_TIMEOUT = 10.0
# The CLI retries a refused login for three minutes; a second refusal is answer enough.
LOGIN_REFUSALS = 2
LOGIN_ADVICE = (
    "Claude Code has no login that is accepted. Log in again: run `claude` and /login as the service's user, or set "
    "ANTHROPIC_API_KEY for the service."
)

TMPDIR_ADVICE = (
    "The directory for the run's temporary files cannot be written: {}. Make room in TMPDIR, or set it to another "
    "directory, and start the run again."
)


class ForeignOutputError(Exception):
    """What is read was not written by Claude Code."""


class Execution:
    """One run from its start to its end. `perform` is called once; `send`, `cancel`, `fail` from any thread, any time.

    Args:
        record: takes each message, in the run's own loop, and gives its index; may wait, and the agent then waits too.
        mirror: takes the transcript as it grows; none is taken if it is left out.
        ask: gets Claude Code's questions answered, in the run's own loop; it is not to ask if left out.
    """

    def __init__(
        self,
        context: RunContext,
        cli_config: CLIConfig,
        environ: Mapping[str, str],
        record: Callable[[dict[str, Any]], Awaitable[int]],
        mirror: Mirror | None = None,
        *,
        ask: Ask | None = None,
    ) -> None:
        self._mirror = mirror
        self._ask = None if ask is None else partial(self._have_answered, ask)
        self._context = context
        self._cli_config = cli_config
        self._environ = environ
        self._record = record
        self._time_limit = cli_config.ceilings.time_limit(context.timeout_ms)
        self._clock = RunClock(self._time_limit.seconds)
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        # Set in the run's own loop only.
        self._stop = asyncio.Event()
        self._over = asyncio.Event()
        self._stream_ended = asyncio.Event()
        self._connected = asyncio.Event()
        self._exited = asyncio.Event()
        self._recording = False
        self._bytes_after_exit = 0
        # When something was last seen on its way to storage.
        self._last_sign = time.monotonic()
        self._prompt = {**context.user_message(), "uuid": str(uuid.uuid4())}
        self._follow_ups = InputQueue(self._prompt, self._keep)
        self._settling: asyncio.TimerHandle | None = None
        # Why it is to stop: the first reason given is the one that counts.
        self._reason: Outcome | None = None
        self._results: list[dict[str, Any]] = []
        # How many results there were when it was told to stop; None while it was not.
        self._results_before_stop: int | None = None
        self._session_state: str | None = None
        self._login_refusals = 0
        # What the last assistant message of the main thread reports as an error of the API.
        self._api_error: str | None = None
        # The answer that ended the turn that goes on, and the one that ended the last turn.
        self._denial: Answer | None = None
        self._denied: Answer | None = None
        self._said = ""
        self._let_go = True
        # Whether Claude Code closed its output once it was over, with everything said that it had to say.
        self.closed_by_itself = False
        # Whether no process of the run is left that should not be.
        self.left_nothing = False

    # ---- from any thread

    def cancel(self) -> None:
        """Have it stop; it ends as `cancelled`, unless it is over by itself before."""
        self.stop(Outcome(RunStatus.CANCELLED))

    def fail(self, code: str, message: str) -> None:
        """Have it stop; it ends as `error`."""
        self.stop(Outcome(RunStatus.ERROR, code, message))

    def send(self, follow_up: FollowUp) -> None:
        """Put a user's message into it. Whether it takes the message in, `follow_up.taken_in` tells."""
        with self._lock:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._admit, follow_up)
            elif self._over.is_set() or self._stream_ended.is_set():
                follow_up.refuse(_ending())
            else:
                follow_up.refuse(being_started())

    def stop(self, reason: Outcome) -> None:
        """Have it stop; `reason` is how it ends, unless it is over by itself before. The first reason counts."""
        with self._lock:
            if self._reason is None:
                self._reason = reason
            if self._loop is not None and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._stop.set)

    # ---- in the run's thread

    def run(self) -> Outcome:
        """Run it, in an event loop of this thread's own, and say how it ended. No process of it is left then, unless
        `left_nothing` is False.
        """
        started = time.monotonic()
        try:
            outcome = asyncio.run(self._run())
        finally:
            self._end_processes()
        result = self._results[-1] if self._results else None
        return Outcome(
            status=outcome.status,
            error_code=outcome.error_code,
            error_message=outcome.error_message,
            result=result,
            cost_usd=cost(self._results, fresh=self._context.resume is None),
            duration_ms=round((time.monotonic() - started) * 1000),
        )

    def _end_processes(self) -> None:
        """End what a run has left that did not end by itself."""
        if self._reason is None and self._over.is_set() and self._let_go:
            self.left_nothing = True
            return
        try:
            end_marked(self._context.run_id)
            self.left_nothing = True
        except Exception:
            log.exception("run %s: its processes could not be looked for", self._context.run_id)

    async def _run(self) -> Outcome:
        # anyio, beneath the SDK, asks several times for each message which event loop this is; told so, it need not
        # find out.
        sniffio.current_async_library_cvar.set("asyncio")
        with self._lock:
            self._loop = asyncio.get_running_loop()
            if self._reason is not None:
                self._stop.set()
        timekeeper = asyncio.create_task(self._supervised(self._keep_time))
        try:
            return await self._run_claude()
        finally:
            timekeeper.cancel()
            self._stream_ended.set()
            with self._lock:
                self._loop = None
            self._follow_ups.refuse(_ending())

    async def _run_claude(self) -> Outcome:
        missing = self._cli_config.missing()
        if missing is not None:
            return Outcome(RunStatus.ERROR, "CLI_NOT_FOUND", missing)
        if not Path(self._context.cwd).is_dir():
            return Outcome(
                RunStatus.ERROR, "CWD_NOT_FOUND", f"The directory {self._context.cwd} is not there any more."
            )
        with ExitStack() as stack:
            try:
                directory = stack.enter_context(run_directory(self._context.run_id))
                options = sdk_options(
                    self._context, self._cli_config, self._environ, directory, self._mirror, ask=self._ask
                )
            except UnusableOptionsError as unusable:
                return Outcome(RunStatus.ERROR, "OPTIONS_UNUSABLE", str(unusable))
            except OSError as error:
                log.error("run %s: its directory cannot be written: %s", self._context.run_id, error)  # noqa: TRY400
                return Outcome(RunStatus.ERROR, "TMPDIR_NOT_WRITABLE", TMPDIR_ADVICE.format(error.strerror))
            raised = await self._converse(Client(options))
            self._said = said_on_stderr(directory)
        return self._judge(raised)

    async def _converse(self, client: Client) -> BaseException | None:
        """Start Claude Code, have it answer, and see it end. Gives what the SDK raised, if anything."""
        # Never cancelled before the stream has ended: a cancelled disconnect leaks the CLI and its tools.
        conversation = asyncio.create_task(self._receive(client))
        # A conversation that has ended without saying so itself would be waited for.
        conversation.add_done_callback(self._note_end)
        keeper = asyncio.create_task(self._supervised(partial(self._ensure_end, client)))
        await asyncio.wait((keeper,))
        if not conversation.done():
            # Its processes are gone, and the SDK has not noticed it.
            conversation.cancel()
            await asyncio.wait((conversation,), timeout=CLOSE_TIMEOUT)
        await self._disconnect(client)
        return None if conversation.cancelled() or not conversation.done() else conversation.exception()

    def _note_end(self, _conversation: asyncio.Task[None]) -> None:
        try:
            self._stream_ended.set()
        except Exception:
            log.exception("run %s: the end of its stream could not be noted", self._context.run_id)

    async def _receive(self, client: Client) -> None:
        sending: asyncio.Task[None] | None = None
        try:
            await client.connect()
            self._connected.set()
            if not self._stop.is_set():
                sending = asyncio.create_task(self._supervised(partial(self._write, client)))
                await client.receive_raw(self._take)
        finally:
            self._stream_ended.set()
            if sending is not None:
                sending.cancel()

    async def _ensure_end(self, client: Client) -> None:
        """See the run end, by force where anything in that fails: nobody else would end it."""
        try:
            await self._see_it_end(client)
        except Exception as error:
            self._break(error)
            await self._kill(client)

    async def _supervised(self, part: Callable[[], Awaitable[None]]) -> None:
        """Run a part of the execution beside its main line. A fault in it stops the run, which could else never end."""
        try:
            await part()
        except Exception as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        """A part has failed: the run stops. For the run's own loop."""
        log.error("run %s failed because of a fault", self._context.run_id, exc_info=error)
        if self._reason is None:
            self._reason = Outcome(RunStatus.ERROR, "EXECUTION_ERROR", f"{type(error).__name__}: {error}")
        self._stop.set()

    async def _kill(self, client: Client) -> None:
        """The last resort. It blocks the loop, which has nothing else to do, and so needs no thread."""
        for _ in range(KILL_TRIES):
            if self._stream_ended.is_set():
                return
            try:
                client.signal(signal.SIGKILL)
                end_marked(self._context.run_id)
                await self._ends_within(EXIT_DELAY)
            except Exception:
                log.exception("run %s: Claude Code could not be killed", self._context.run_id)
                await asyncio.sleep(EXIT_DELAY)

    async def _keep_time(self) -> None:
        """Has the run stop when its time is used up, if it has not come to an end by itself."""
        await self._clock.run_out()
        if not any(event.is_set() for event in (self._over, self._exited, self._stream_ended)):
            self.fail("TIMEOUT", self._time_limit.message)

    async def _disconnect(self, client: Client) -> None:
        try:
            await client.disconnect()
        except Exception:
            # The run is over, and how it went is known; what is left of it is ended by its mark.
            log.exception("run %s: Claude Code could not be let go", self._context.run_id)
            self._let_go = False

    # ---- what it is told

    def _admit(self, follow_up: FollowUp) -> None:
        try:
            self._take_on(follow_up)
        except Exception:
            log.exception("run %s: a message could not be taken on", self._context.run_id)
            told = "The message could not be taken on, because of a fault; the service's log says more. Try again."
            follow_up.refuse(NotTakenIn(told))

    def _take_on(self, follow_up: FollowUp) -> None:
        """Take a message on, or refuse it. It is in flight in the same step of the loop, so the run cannot end between
        the look at it and the message: one that is taken on is either taken in, or refused at the end.
        """
        largest = self._cli_config.max_message_bytes - REPLAY_BYTES
        if self._ending:
            follow_up.refuse(_ending())
        elif self._follow_ups.size + follow_up.size > largest:
            # Those that share a turn come back in one message, and a larger one ends the run.
            follow_up.refuse(
                TooLarge(
                    f"The message has more than {largest} bytes, together with those that have not been answered yet; "
                    "CCM_MAX_MESSAGE_BYTES sets the limit. Send it when they are."
                )
            )
        else:
            self._follow_ups.add(follow_up)

    @property
    def _ending(self) -> bool:
        return any(event.is_set() for event in (self._over, self._stop, self._exited, self._stream_ended))

    async def _write(self, client: Client) -> None:
        """Writes what the CLI is told, one message after the other; a CLI that does not read holds up only this."""
        try:
            await client.query(self._messages())
        except Exception as error:
            # One that is just ending says better why, and what it has said still is to be read.
            if not await self._ends_within(CLOSE_TIMEOUT) and not self._ending:
                self.fail("CLI_CRASHED", f"Claude Code takes no input any more: {error}")

    async def _messages(self) -> AsyncIterator[dict[str, Any]]:
        yield self._prompt
        while True:
            message = await self._follow_ups.next()
            if self._ending:
                return
            yield message

    # ---- what it says

    async def _take(self, message: dict[str, Any]) -> None:
        if message.get("command_uuid") == self._prompt["uuid"]:
            return  # its messages and results tell as much of the prompt
        if self._exited.is_set():
            self._check_writer(message)
        if self._settling is not None:
            self._settling.cancel()
        kind, subtype = message.get("type"), message.get("subtype")
        if kind == "system" and subtype == "session_state_changed":
            # Switched on for ourselves: acted on, and no part of the record.
            self._session_state = message.get("state")
        elif kind == "system" and subtype == "mirror_error":
            # The SDK's own word, of a fault of this service's storage. The transcript is taken from its file instead.
            reason = message.get("error") or "no reason is given"
            log.warning("run %s: its transcript could not be mirrored: %s", self._context.run_id, reason)
        elif not await self._follow_ups.heed(message):
            await self._keep(message)
        self._note(message, kind, subtype)
        # A CLI that tells no states (an older one) ends at its result.
        if self._results and self._session_state in (None, "idle"):
            if not self._follow_ups.in_flight:
                self._over.set()
            elif self._session_state == "idle" or kind == "result":
                # Nothing goes on, though a message was sent: it gets a turn now, or the CLI does not know of it.
                self._settling = asyncio.get_running_loop().call_later(SETTLE_TIMEOUT, self._over.set)

    def _check_writer(self, message: dict[str, Any]) -> None:
        """
        Raises:
            ForeignOutputError: the CLI has gone and cannot have said that much.
        """
        self._bytes_after_exit += len(to_json_text(message))
        if self._bytes_after_exit > PIPE_BYTES + self._cli_config.max_message_bytes:
            raise ForeignOutputError("another process goes on writing to the output of a Claude Code that has ended")

    def _note(self, message: dict[str, Any], kind: object, subtype: object) -> None:
        """Remember what a message tells of how the run goes."""
        if kind == "result":
            self._results.append(message)
            self._denied, self._denial = self._denial, None
        elif kind == "system" and subtype == "api_retry" and message.get("error_status") == 401:
            self._login_refusals += 1
            if self._login_refusals == LOGIN_REFUSALS:
                self.fail("AUTHENTICATION_FAILED", LOGIN_ADVICE)
        elif kind in ("assistant", "stream_event"):
            if not message.get("error"):
                self._login_refusals = 0  # the login was refreshed
            if kind == "assistant" and message.get("parent_tool_use_id") is None:
                self._api_error = message.get("error")

    async def _keep(self, message: dict[str, Any]) -> int:
        self._recording = True
        try:
            return await self._record(message)
        finally:
            self._recording = False
            if not self._exited.is_set():  # or else somebody who goes on talking in its place is waited for
                self._last_sign = time.monotonic()

    async def _have_answered(self, ask: Ask, question: Question) -> Answer:
        """The answer to a question; the wait for it does not count as the run's time."""
        asking = asyncio.create_task(_awaited(ask(question)))
        stop = asyncio.create_task(self._stop.wait())
        try:
            with self._clock.paused():
                await asyncio.wait((asking, stop), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                # The run is told to stop: nobody is to answer any more, and Claude Code is not to go on with an answer.
                asking.cancel()
                await self._stream_ended.wait()
                raise asyncio.CancelledError  # as where Claude Code takes its question back: nobody reads an answer
        finally:
            asking.cancel()
            stop.cancel()
        answer = asking.result()
        if answer.interrupt:
            self._denial = answer
        return answer

    # ---- how it is ended

    async def _see_it_end(self, client: Client) -> None:
        """Waits for the run to be over or to be stopped, then ends the CLI by steps, each with its bound.

        It only ever asks the CLI to end; the reader beside it goes on until the stream is closed. With a reader that
        stands still (storage is behind) an interrupt would hang, so it is left out then.
        """
        exit_watch = asyncio.create_task(self._supervised(partial(self._notice_exit, client)))
        try:
            await self._reach_the_end()
            if self._exited.is_set() and not self._connected.is_set():
                # The SDK waits for an answer that nobody will give any more, unless it has noticed it by itself.
                await self._ends_within(CLOSE_TIMEOUT)
                return
            if self._stop.is_set() and not self._over.is_set():
                self._results_before_stop = len(self._results)
            if self._results_before_stop is not None and self._connected.is_set() and not self._recording:
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(INTERRUPT_TIMEOUT):
                        await client.interrupt()
                        await _first(self._over, self._stream_ended)
            if self._over.is_set():
                # Bounded: a message that the CLI does not read holds the input.
                with contextlib.suppress(Exception):
                    async with asyncio.timeout(CLOSE_TIMEOUT):
                        await client.end_input()
            if (self._over.is_set() or self._exited.is_set()) and await self._closes():
                self.closed_by_itself = self._over.is_set()
                return
            while not self._stream_ended.is_set() and self._silence() < SILENT_TIMEOUT:
                client.signal(signal.SIGTERM)
                if await self._ends_within(TERMINATE_TIMEOUT):
                    return
                client.signal(signal.SIGKILL)
                await self._free_output(client, cut_off=False)
                if await self._ends_within(TERMINATE_TIMEOUT):
                    return
                if self._stop.is_set() and self._exited.is_set() and self._silence() > CLOSE_TIMEOUT:
                    # A process without the run's mark holds the output, or the SDK has failed: who wants the run to
                    # stop is not to wait for either.
                    return
        finally:
            exit_watch.cancel()

    async def _reach_the_end(self) -> None:
        """Return when the run is over, is to be stopped, or has lost Claude Code."""
        events = (self._over, self._stop, self._stream_ended, self._exited)
        while not any(event.is_set() for event in events):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REASON_INTERVAL):
                    await _first(*events)
            if self._reason is not None:
                self._stop.set()

    async def _notice_exit(self, client: Client) -> None:
        """When the CLI has gone, free its output: a tool that holds it open would hold the run open too."""
        while not (self._connected.is_set() or client.is_started):
            await asyncio.sleep(SPAWN_INTERVAL)
        code = await client.wait_for_exit()
        self._exited.set()
        if not await self._ends_within(EXIT_DELAY):
            await self._free_output(client, cut_off=code != 0 and not self._over.is_set())

    async def _free_output(self, client: Client, cut_off: bool) -> None:
        """End what holds the output open that a CLI that has gone no longer writes to.

        Nothing else, unless the run was stopped or cut off: the stream may be open only because storage is slow, and
        what a run that ended by itself has left running is to stay.
        """
        everything = cut_off or self._stop.is_set()
        await asyncio.to_thread(end_marked, self._context.run_id, holding=None if everything else client.output())

    async def _closes(self) -> bool:
        """Whether the stream ends without force. Claude Code gets CLOSE_TIMEOUT for it, storage as long as it takes."""
        while not await self._ends_within(CLOSE_TIMEOUT):
            waits = self._storing or (self._exited.is_set() and self._silence() < SILENT_TIMEOUT)
            if self._stop.is_set() or not waits:
                return False
        return True

    @property
    def _storing(self) -> bool:
        """Whether something that Claude Code has said is on its way to storage."""
        return self._recording or (self._mirror is not None and self._mirror.busy)

    def _silence(self) -> float:
        """Seconds for which nothing has been on its way to storage."""
        if self._storing:
            self._last_sign = time.monotonic()
        return time.monotonic() - self._last_sign

    async def _ends_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stream_ended.wait()
        return self._stream_ended.is_set()

    # ---- afterwards

    def _judge(self, error: BaseException | None) -> Outcome:
        """How it ended. What the result says counts for more than how the process went."""
        if self._reason is not None and self._results_before_stop is not None:
            since = self._results[self._results_before_stop :]
            # A turn that ended well all the same was the last, unless there was a message still to be answered.
            if not since or self._follow_ups.unanswered or any(result.get("is_error") for result in since):
                return self._reason
        if self._over.is_set() and self._results:
            result = self._results[-1]
            if not result.get("is_error"):
                return Outcome(RunStatus.COMPLETED)
            if self._reason is not None:
                return self._reason
            if self._denied is not None:
                told = f"An approval was denied with interrupt: {self._denied.message}"
                return Outcome(RunStatus.ERROR, "APPROVAL_DENIED", told)
            code = error_code(result, self._api_error)
            said = error_text(result)
            return Outcome(
                RunStatus.ERROR, code, _sentences(said, LOGIN_ADVICE) if code == "AUTHENTICATION_FAILED" else said
            )
        if self._reason is not None:
            return self._reason
        code, message = explain(error, self._said, self._cli_config.max_message_bytes)
        if code == "EXECUTION_ERROR":
            log.error("run %s: %r", self._context.run_id, error, exc_info=error)
        return Outcome(RunStatus.ERROR, code, message)


def _sentences(said: str, advice: str) -> str:
    """Two texts as two sentences, whatever the first ends with."""
    return f"{said} {advice}" if said.endswith((".", "!", "?")) else f"{said}. {advice}"


def _ending() -> RunEnding:
    return RunEnding("The run is ending and takes no more messages. Resume its session instead.")


async def _awaited(answer: Awaitable[Answer]) -> Answer:
    return await answer


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
