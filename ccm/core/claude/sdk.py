"""The SDK, with the extensions that the service needs. The only importer of claude_agent_sdk.

The SDK's message classes drop message types and fields that they do not know, so the raw dicts are taken before the SDK
parses them (`Client.receive_raw`). That uses private parts of the SDK. Its version is therefore pinned, all code that
uses them is in this file, and tests/contracts/test_sdk.py names them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import anyio
from anyio.streams.text import TextReceiveStream, TextSendStream
from claude_agent_sdk import (
    AgentDefinition,
    ClaudeAgentOptions,
    ClaudeSDKClient,
    CLIConnectionError,
    CLIJSONDecodeError,
    CLINotFoundError,
    PermissionResultAllow,
    PermissionResultDeny,
    PermissionUpdate,
    ProcessError,
    ResultError,
    ToolPermissionContext,
    __version__,
)
from claude_agent_sdk._internal.transport import subprocess_cli

from ccm.core.claude.cli_process import CLIProcess
from ccm.core.claude.launch import Launch
from ccm.models import Answer, Question, RunErrorCode

__all__ = ["AgentDefinition", "ClaudeAgentOptions", "Client", "explain", "permission_callback"]

log = logging.getLogger(__name__)

# What a CLI says while it is claimed. One that is started for its run does not say it.
CLAIM_SUBTYPES = ("commands_changed", "status", "ui_invalidate")


class _Tap:
    """Replaces the sending end of the SDK's message stream and takes each raw message as soon as the SDK reads it.

    The stream itself would cost two passes of the event loop per message, half of the SDK's time for it, and would
    buffer a hundred messages outside of the memory budget.

    Args:
        take: awaited for each message; the SDK reads nothing meanwhile.
    """

    def __init__(self, take: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self._take = take
        # Messages that came in without waiting: before the tap was set, or from the SDK itself.
        self._pending: list[dict[str, Any]] = []
        self._caught_up = asyncio.Event()
        self.ended = asyncio.Event()
        self.error: Exception | None = None

    async def catch_up(self) -> None:
        """Process the messages that arrived before the tap was set. Later ones wait until that is done."""
        await self.process_pending()
        self._caught_up.set()

    async def send(self, message: dict[str, Any]) -> None:
        if not self._caught_up.is_set():
            await self._caught_up.wait()
        if self._pending:
            await self.process_pending()
        await self._process(message)

    async def process_pending(self) -> None:
        messages, self._pending = self._pending, []
        for message in messages:
            await self._process(message)

    async def _process(self, message: dict[str, Any]) -> None:
        if message.get("type") == "error" and "exception" in message:
            self.error = message["exception"]  # the SDK's way to report that its reader has failed
        elif message.get("type") != "end":
            await self._take(message)

    def send_nowait(self, message: dict[str, Any]) -> None:
        """Take a message without waiting. The SDK's own say that the stream ended."""
        self._pending.append(message)

    def close(self) -> None:
        self.ended.set()


class _Transport(subprocess_cli.SubprocessCLITransport):
    """Starts the CLI as `Launch` says, without a shell, whose start would take longer than all the rest.

    The SDK itself would pass on all variables of the service, among them its secrets, and would stop reading a stderr
    pipe at the first byte that is not UTF-8, so that the run would hang once the pipe is full.

    Args:
        source: how to start the CLI, or its process if it has been started before.
    """

    def __init__(self, options: ClaudeAgentOptions, source: Launch | CLIProcess) -> None:
        # As the SDK does for its own transport: permission requests are asked as control requests.
        tool = None if options.can_use_tool is None else "stdio"
        super().__init__("", replace(options, permission_prompt_tool_name=tool))
        self._source = source

    def start(self, launch: Launch) -> CLIProcess:
        """Start the process. The rest of the transport needs `connect`.

        Raises:
            CLIConnectionError: it cannot be started.
        """
        environ = {
            "CLAUDE_CODE_ENTRYPOINT": "sdk-py",
            "CLAUDE_CODE_SDK_READS_SESSION_STATE": "1",  # the SDK reads from it when a run is over
            **launch.environ,
            **self._options.env,
            "CLAUDE_AGENT_SDK_VERSION": __version__,
            "PWD": str(self._cwd),
        }
        try:
            return CLIProcess(
                [*launch.prefix, *self._build_command()],
                cwd=str(self._cwd),
                environ=environ,
                stderr=launch.stderr,
                open_files=launch.open_files,
            )
        except OSError as error:
            raise CLIConnectionError(str(error)) from error

    async def connect(self) -> None:
        """Start the process unless that is done, and open its pipes."""
        if self._process is not None:
            return
        source = self._source
        process = source if isinstance(source, CLIProcess) else self.start(source)
        self._process = process  # type: ignore[assignment]  # has what the SDK uses of anyio's
        # Those that are left get SIGTERM when the service exits.
        subprocess_cli._ACTIVE_CHILDREN.add(process)  # type: ignore[arg-type]
        try:
            standard_input, output = await process.attach()
        except BaseException:
            process.kill()  # the SDK does not end a process whose transport is not connected
            raise
        self._stdin_stream = TextSendStream(standard_input)
        self._stdout_stream = TextReceiveStream(output)
        self._ready = True


def start_process(options: ClaudeAgentOptions, launch: Launch) -> CLIProcess:
    """Start the CLI for a client that is made later, in this or another thread.

    Raises:
        CLIConnectionError: it cannot be started.
    """
    return _Transport(options, launch).start(launch)


class Client(ClaudeSDKClient):
    """The SDK's client, extended by raw messages, the CLI's process and its pipes."""

    # The subtypes of messages that came before the first prompt and are left out.
    _skipped_subtypes: tuple[str, ...] = ()

    @classmethod
    def launching(cls, options: ClaudeAgentOptions, launch: Launch) -> Client:
        """Return a client that starts the CLI as `launch` says."""
        return cls(options, transport=_Transport(options, launch))

    @classmethod
    def of_process(cls, options: ClaudeAgentOptions, process: CLIProcess) -> Client:
        """Return a client of a CLI that was started before."""
        return cls(options, transport=_Transport(options, process))

    @property
    def is_connected(self) -> bool:
        """Whether the CLI has answered the SDK's first request."""
        return self._query is not None and self._query._initialized

    async def claim(self, claim: Mapping[str, Any], model: str | None) -> None:
        """Bind a connected CLI that was started with `--await-claim` to a run.

        Args:
            claim: the fields of the control request `claim_session`.
            model: the run's model, which is no field of that request.

        Raises:
            Exception: the CLI refuses, or does not know the request; its process cannot be used for anything else.
        """
        if self._query is None:
            raise CLIConnectionError("not connected")
        await self._query._send_control_request({"subtype": "claim_session", **claim})
        if model is not None:
            await self._query._send_control_request({"subtype": "set_model", "model": model})
        self._skipped_subtypes = CLAIM_SUBTYPES

    async def receive_raw(self, take: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        """Pass each message to `take`, as the CLI sent it, until the stream ends.

        That includes messages of types that the SDK does not know, but no control messages.

        Raises:
            ClaudeSDKError: the stream ended with an error.
        """
        query = self._query
        if query is None:
            raise CLIConnectionError("not connected")
        tap = _Tap(take)
        stream, query._message_send = query._message_send, tap
        await asyncio.sleep(0)  # the reader may be about to send: a stream that is closed meanwhile would fail the run
        with contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream):
            while True:
                message = query._message_receive.receive_nowait()
                if message.get("subtype") not in self._skipped_subtypes:
                    tap.send_nowait(message)
        if stream.statistics().open_send_streams == 0:
            tap.close()  # the SDK's reader has ended already
        stream.close()
        await tap.catch_up()
        await tap.ended.wait()
        await tap.process_pending()
        if tap.error is not None:
            raise tap.error

    async def interrupt(self) -> None:
        """Ask the CLI to end its turn and to drop its queued messages, with which it would otherwise continue."""
        if self._query is None:
            raise CLIConnectionError("not connected")
        await self._query._send_control_request({"subtype": "interrupt", "cancel_queued": True})

    async def disconnect(self) -> None:
        """Disconnect from the CLI and close its pipes, even if another process holds the other end open."""
        process = self._cli_process
        try:
            await super().disconnect()
        finally:
            if process is not None:
                process.close()

    async def end_input(self) -> None:
        """Close the CLI's input. It then finishes its transcript and exits."""
        if self._transport is not None:
            await self._transport.end_input()

    @property
    def _cli_process(self) -> CLIProcess | None:
        return getattr(self._transport, "_process", None)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the CLI unless it has exited."""
        if self._cli_process is not None:
            self._cli_process.send_signal(number)

    @property
    def is_started(self) -> bool:
        """Whether the CLI's process was started."""
        return self._cli_process is not None

    async def wait_for_exit(self) -> int:
        """Return the exit code of the CLI once it has exited, although a tool may still hold its output open."""
        return 0 if self._cli_process is None else await self._cli_process.wait()

    def output(self) -> str:
        """Return the pipe that the CLI writes to, as /proc names it; empty once it has been read to its end."""
        return "" if self._cli_process is None else self._cli_process.output()


def permission_callback(
    ask: Callable[[Question], Awaitable[Answer]],
) -> Callable[[str, dict[str, Any], ToolPermissionContext], Awaitable[PermissionResultAllow | PermissionResultDeny]]:
    """Return the SDK's callback for permission requests, which it calls in the run's own loop.

    Args:
        ask: returns the answer; cancelled if Claude Code withdraws its request.
    """

    async def can_use_tool(
        tool_name: str, tool_input: dict[str, Any], context: ToolPermissionContext
    ) -> PermissionResultAllow | PermissionResultDeny:
        answer = await ask(
            Question(
                tool_name=tool_name,
                tool_use_id=context.tool_use_id,
                input=tool_input,
                suggestions=_suggestions(context.suggestions),
                title=context.title,
                display_name=context.display_name,
                description=context.description,
                blocked_path=context.blocked_path,
                decision_reason=context.decision_reason,
                agent_id=context.agent_id,
            )
        )
        if not answer.allow:
            return PermissionResultDeny(message=answer.message or "", interrupt=answer.interrupt)
        # Remembered for this run only: unchanged, they would be written to settings files of the host.
        remembered = [replace(update, destination="session") for update in context.suggestions]
        return PermissionResultAllow(
            updated_input=None if answer.updated_input is None else dict(answer.updated_input),
            updated_permissions=remembered if answer.remember else None,
        )

    return can_use_tool


def _suggestions(updates: list[PermissionUpdate]) -> tuple[dict[str, Any], ...]:
    """Return the suggestions as Claude Code sent them, or none if the SDK cannot convert one of them."""
    try:
        return tuple(update.to_dict() for update in updates)
    except ValueError as error:
        log.warning(
            "cannot offer Claude Code's permission suggestions: %s", error, extra={"event": "suggestions_dropped"}
        )
        return ()


def explain(error: BaseException | None, stderr: str, max_message_bytes: int) -> tuple[RunErrorCode, str]:
    """Return the error code and the message of a run that ended without a result.

    Args:
        error: the exception that the SDK raised, if any.
        stderr: the end of the CLI's stderr.
    """
    if isinstance(error, CLINotFoundError):
        return RunErrorCode.CLI_NOT_FOUND, str(error)
    if isinstance(error, CLIJSONDecodeError) and "maximum buffer size" in error.line:
        return RunErrorCode.MESSAGE_TOO_LARGE, (
            f"Claude Code sent a message of more than {max_message_bytes} bytes; CCM_MAX_MESSAGE_BYTES sets the limit."
        )
    if isinstance(error, CLIJSONDecodeError):
        return RunErrorCode.CLI_CRASHED, "Claude Code sent a message that is not JSON."
    if isinstance(error, ResultError):
        gone = "No conversation found" in str(error)
        code = RunErrorCode.SESSION_NOT_RESUMABLE if gone else RunErrorCode.EXECUTION_ERROR
        return code, _with("; ".join(error.errors) or str(error), stderr)
    if isinstance(error, ProcessError):
        return RunErrorCode.CLI_CRASHED, _with(f"Claude Code ended with exit code {error.exit_code}.", stderr)
    if isinstance(error, CLIConnectionError):
        return RunErrorCode.CLI_CRASHED, _with(f"Claude Code could not be started: {error}", stderr)
    if error is not None and "Control request timeout" in str(error):
        return RunErrorCode.CLI_NOT_RESPONDING, _with("Claude Code was started and did not answer.", stderr)
    if error is not None:
        return RunErrorCode.EXECUTION_ERROR, _with(f"{type(error).__name__}: {error}", stderr)
    return RunErrorCode.CLI_CRASHED, _with("Claude Code ended before it gave a result.", stderr)


def _with(message: str, stderr: str) -> str:
    return f"{message}\n{stderr}" if stderr else message
