"""Claude Code that is started before the request that it serves: a spare for a fresh run, or a warm continuation.

A spare waits in its own empty directory (`--await-claim`) and is bound to a run's directory and options when the run
begins. A warm continuation has already loaded the transcript of the run that it continues. Both have their ids from
the start, and the run that uses them takes these ids: then its processes, files and transcript are named as those of
any other run. The flag is hidden: tests/contracts/test_claim.py names what is used of it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ccm.core.claude.cli_process import CLIProcess
from ccm.core.claude.launch import launch
from ccm.core.claude.prestart_key import Ids, Key
from ccm.core.claude.run_context import Ask, CLIConfig, RunContext
from ccm.core.claude.run_directory import new_run_directory, remove_run_directory
from ccm.core.claude.sdk import ClaudeAgentOptions, Client, permission_callback, start_process
from ccm.core.claude.sdk_options import sdk_options
from ccm.models import Answer, Question

# How long it may take until it is ready for a run (seconds).
CLAIM_TIMEOUT = 5.0


@dataclass(frozen=True)
class Prestarted:
    """A Claude Code that waits for a run.

    Attributes:
        directory: its run directory.
        options: those that it was started with.
        state: what it has read at its start and does not read again (start_state.py).
        started_at: the `time.monotonic()` of its start.
        settled: called with the reason why it cannot serve the run that has taken it, None if it can.
    """

    ids: Ids
    key: Key
    directory: Path
    options: ClaudeAgentOptions
    process: CLIProcess
    state: Hashable
    started_at: float
    settled: Callable[[str | None], None] = lambda _: None

    async def take_over(
        self, context: RunContext, cli_config: CLIConfig, ask: Ask | None, stop: asyncio.Event
    ) -> Client | None:
        """Return a client that is ready for the run's prompt; None if the run must stop, or start its own Claude Code.

        This one is killed then. Whatever it refuses or fails at, a start of its own may do: that decides.

        Args:
            stop: set if the run must stop.
        """
        connecting = asyncio.create_task(self._connect(context, cli_config, ask))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((connecting, stopping), timeout=CLAIM_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if connecting.done() and connecting.exception() is None:
            self.settled(None)
            return connecting.result()
        # Its process first: a disconnect would wait for its exit. It has begun nothing that it could finish.
        self.process.kill()
        if not connecting.done():
            connecting.cancel()
            await asyncio.wait((connecting,), timeout=CLAIM_TIMEOUT)
        failure = "it did not answer" if connecting.cancelled() or not connecting.done() else connecting.exception()
        if not stop.is_set():
            self.settled(str(failure))
        return None

    async def _connect(self, context: RunContext, cli_config: CLIConfig, ask: Ask | None) -> Client:
        """Return a client that is connected to it and has bound it to the run.

        Raises:
            Exception: it refuses the run, or has ended. It cannot be used for another run then.
        """
        if self.key.resume is None:
            options = sdk_options(context, cli_config, self.directory, ask=ask)
        else:
            options = replace(self.options, can_use_tool=None if ask is None else permission_callback(ask))
        client = Client.of_process(options, self.process)
        try:
            await client.connect()
            if self.key.resume is None:
                await client.claim(_claim(options, context.options.get("systemPrompt")), options.model)
        except BaseException:
            await client.disconnect()
            raise
        return client

    def end(self, seconds: float) -> None:
        """End it unless it has exited, by force after `seconds`, and remove its directory. Waits for its exit."""
        self.process.end(seconds)
        remove_run_directory(self.directory)


def prestart(ids: Ids, key: Key, cli_config: CLIConfig, state: Hashable) -> Prestarted:
    """Start a Claude Code. The kernel ends it with the thread that calls this.

    Args:
        state: as it was before this call.

    Raises:
        OSError, CLIConnectionError, UnusableOptionsError: it cannot be started.
    """
    directory = new_run_directory(ids.run_id)
    try:
        context = RunContext(
            run_id=ids.run_id,
            sdk_session_id=ids.sdk_session_id,
            cwd=key.cwd or str(directory),
            prompt="",
            images=(),
            options=json.loads(key.options),
            resume=key.resume,
        )
        options = sdk_options(context, cli_config, directory, ask=_deny if key.approvals else None)
        if key.resume is None:
            options.extra_args["await-claim"] = None
        process = start_process(options, launch(cli_config, directory))
    except BaseException:
        remove_run_directory(directory)
        raise
    return Prestarted(ids, key, directory, options, process, state, time.monotonic())


async def _deny(_question: Question) -> Answer:
    """Stand for the callback of the run, which replaces it before anything is asked."""
    return Answer(allow=False)


def _claim(options: ClaudeAgentOptions, prompt: Any) -> dict[str, Any]:
    """Return the fields of the control request that binds a spare to a run.

    Args:
        prompt: the run's option `systemPrompt`. The SDK's options have it in a file, which only a start reads.
    """
    claim: dict[str, Any] = {"cwd": str(options.cwd), "permission_mode": options.permission_mode}
    if options.add_dirs:
        claim["additional_directories"] = [str(directory) for directory in options.add_dirs]
    if isinstance(prompt, str):
        claim["system_prompt"] = [prompt]
    elif prompt is not None and prompt["type"] == "custom":
        claim["system_prompt"] = [prompt["prompt"]]
    elif prompt is not None and "append" in prompt:
        claim["append_system_prompt"] = prompt["append"]
    return claim
