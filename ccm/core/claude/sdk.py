"""The SDK, and what the service needs of it beyond what it offers. The only importer of claude_agent_sdk.

The SDK's own message classes drop what they do not know, whole types and single fields, so the raw dicts are taken
before they are parsed (`Client.receive_raw`). That reaches into the SDK: its version is pinned, all of it is here, and
tests/contracts/test_sdk.py fails first when an upgrade takes something of it away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import anyio
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
)

from ccm.models import Answer, Question

__all__ = [
    "AgentDefinition",
    "ClaudeAgentOptions",
    "Client",
    "explain",
    "permission_callback",
]

log = logging.getLogger(__name__)


class _Tap:
    """Stands in for the sending end of the SDK's message stream, and takes each raw message where the SDK reads it.

    The stream itself would cost two passes of the event loop for each message, half of what the SDK takes for it, and
    hold a hundred messages that no budget knows of.

    Args:
        take: awaited for each message; while it waits the SDK reads nothing.
        earlier: what had come before the tap was set.
    """

    def __init__(self, take: Callable[[dict[str, Any]], Awaitable[None]], earlier: list[dict[str, Any]]) -> None:
        self._take = take
        self._earlier = earlier
        self._noted: list[dict[str, Any]] = []
        self._caught_up = asyncio.Event()
        self.ended = asyncio.Event()
        self.error: Exception | None = None

    async def catch_up(self) -> None:
        for message in self._earlier:
            await self._sort(message)
        self._caught_up.set()

    async def send(self, message: dict[str, Any]) -> None:
        if not self._caught_up.is_set():
            await self._caught_up.wait()
        await self.take_noted()
        await self._sort(message)

    async def take_noted(self) -> None:
        noted, self._noted = self._noted, []
        for message in noted:
            await self._sort(message)

    async def _sort(self, message: dict[str, Any]) -> None:
        if message.get("type") == "error" and "exception" in message:
            self.error = message["exception"]  # the SDK's own word for: the reader has failed
        elif message.get("type") != "end":
            await self._take(message)

    def send_nowait(self, message: dict[str, Any]) -> None:
        """The SDK calls it for what it has to say itself: that a transcript could not be mirrored, and the end."""
        self._noted.append(message)

    def close(self) -> None:
        self.ended.set()


class Client(ClaudeSDKClient):
    """The SDK's client with the eight things that it does not offer."""

    async def receive_raw(self, take: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        """Have `take` get all that the CLI says until its stream ends: the messages as they came, those of unknown
        types too; control messages excepted.

        Raises:
            ClaudeSDKError: how the stream ended, if not well.
        """
        query = self._query
        if query is None:
            raise CLIConnectionError("not connected")
        earlier: list[dict[str, Any]] = []
        tap = _Tap(take, earlier)
        stream, query._message_send = query._message_send, tap
        await asyncio.sleep(0)  # the reader may be about to send: a stream that is closed meanwhile would fail the run
        with contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream):
            while True:
                earlier.append(query._message_receive.receive_nowait())
        if stream.statistics().open_send_streams == 0:
            tap.close()  # the reader had ended before
        stream.close()
        await tap.catch_up()
        await tap.ended.wait()
        await tap.take_noted()
        if tap.error is not None:
            raise tap.error

    async def interrupt(self) -> None:
        """Have the CLI end its turn, and drop the messages that it has in its queue: it would go on with them."""
        if self._query is None:
            raise CLIConnectionError("not connected")
        await self._query._send_control_request({"subtype": "interrupt", "cancel_queued": True})

    async def disconnect(self) -> None:
        """Let the CLI go, and close its pipes, also where another process holds the other end open."""
        process = getattr(self._transport, "_process", None)
        try:
            await super().disconnect()
        finally:
            if process is not None:
                process._process._transport.close()

    async def end_input(self) -> None:
        """Tell the CLI that nothing more will come; it then writes its transcript out and exits."""
        if self._transport is not None:
            await self._transport.end_input()

    def signal(self, number: signal.Signals) -> None:
        """Signal the CLI, if it lives."""
        process = getattr(self._transport, "_process", None)
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    @property
    def is_started(self) -> bool:
        """Whether the CLI's process is there, or was."""
        return getattr(self._transport, "_process", None) is not None

    async def wait_for_exit(self) -> int:
        """Return when the CLI's process has gone, though a tool may still hold its output open. Gives its exit code."""
        process = getattr(self._transport, "_process", None)
        return 0 if process is None else int(await process.wait())

    def output(self) -> str:
        """The pipe that the CLI writes to, as /proc names it; empty once it has been read to its end."""
        process = getattr(self._transport, "_process", None)
        if process is None:
            return ""
        pipe = process.stdout._stream._transport.get_extra_info("pipe")
        # Both ends of a pipe have one inode.
        return "" if pipe.closed else f"pipe:[{os.fstat(pipe.fileno()).st_ino}]"


def permission_callback(
    ask: Callable[[Question], Awaitable[Answer]],
) -> Callable[[str, dict[str, Any], ToolPermissionContext], Awaitable[PermissionResultAllow | PermissionResultDeny]]:
    """What the SDK calls, in the run's own loop, before Claude Code uses a tool that it would ask the user about.

    Args:
        ask: gets the answer; cancelled when Claude Code takes its question back.
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
        # For this run only: as they are they would go into settings files of the host.
        remembered = [replace(update, destination="session") for update in context.suggestions]
        return PermissionResultAllow(
            updated_input=None if answer.updated_input is None else dict(answer.updated_input),
            updated_permissions=remembered if answer.remember else None,
        )

    return can_use_tool


def _suggestions(updates: list[PermissionUpdate]) -> tuple[dict[str, Any], ...]:
    """As Claude Code gave them; none, if the SDK could not give them back: it takes all or none."""
    try:
        return tuple(update.to_dict() for update in updates)
    except ValueError as error:
        log.warning("a permission suggestion of Claude Code's cannot be offered: %s", error)
        return ()


def explain(error: BaseException | None, said: str, max_message_bytes: int) -> tuple[str, str]:
    """The code and the sentence for a run that ended without a result.

    Args:
        error: what the SDK raised, if anything.
        said: the last lines of the CLI's stderr.
    """
    if isinstance(error, CLINotFoundError):
        return "CLI_NOT_FOUND", str(error)
    if isinstance(error, CLIJSONDecodeError) and "maximum buffer size" in error.line:
        return "MESSAGE_TOO_LARGE", (
            f"Claude Code sent a message of more than {max_message_bytes} bytes; CCM_MAX_MESSAGE_BYTES sets the limit."
        )
    if isinstance(error, CLIJSONDecodeError):
        return "CLI_CRASHED", "Claude Code sent a message that is no JSON."
    if isinstance(error, ResultError):
        code = "SESSION_NOT_RESUMABLE" if "No conversation found" in str(error) else "EXECUTION_ERROR"
        return code, _with("; ".join(error.errors) or str(error), said)
    if isinstance(error, ProcessError):
        return "CLI_CRASHED", _with(f"Claude Code ended with exit code {error.exit_code}.", said)
    if isinstance(error, CLIConnectionError):
        return "CLI_CRASHED", _with(f"Claude Code could not be started: {error}", said)
    if error is not None and "Control request timeout" in str(error):
        return "CLI_NOT_RESPONDING", _with("Claude Code was started and did not answer.", said)
    if error is not None:
        return "EXECUTION_ERROR", _with(f"{type(error).__name__}: {error}", said)
    return "CLI_CRASHED", _with("Claude Code ended before it gave a result.", said)


def _with(message: str, stderr: str) -> str:
    return f"{message}\n{stderr}" if stderr else message
