"""What one run is made from: the assignment, the Claude Code that is to do it, and the SDK's options for the two."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ccm.core.claude.options import sdk_arguments
from ccm.core.claude.processes import LAUNCH_SCRIPT, launch_environment
from ccm.core.claude.run_directory import STDERR_FILE
from ccm.core.claude.sdk import AgentDefinition, ClaudeAgentOptions, permission_callback
from ccm.core.policy.ceilings import Ceilings
from ccm.models import Answer, Image, Question

Ask = Callable[[Question], Awaitable[Answer]]


class Mirror(Protocol):
    """The SDK's session store for one run (core/transcripts/store.py). It takes the transcript as it grows."""

    @property
    def busy(self) -> bool:
        """Whether entries are on their way to storage."""


@dataclass(frozen=True)
class CLIConfig:
    """Which Claude Code runs are made with, and what holds for all of them.

    Args:
        open_files: the limit of open files that agents get; the service's own if left out.
    """

    cli_path: Path
    permission_mode: str
    setting_sources: tuple[str, ...]
    max_message_bytes: int
    ceilings: Ceilings = Ceilings()
    open_files: int | None = None

    def missing(self) -> str | None:
        """Why it cannot be started, or None."""
        if not self.cli_path.is_file():
            return f"Claude Code is not at {self.cli_path}; reinstall claude-agent-sdk or set CCM_CLI_PATH."
        if not os.access(self.cli_path, os.X_OK):
            return f"Claude Code at {self.cli_path} may not be executed by this user."
        return None


@dataclass(frozen=True)
class RunContext:
    """One run, as the executor is given it.

    Args:
        timeout_ms: the time limit that its request named, or None.
        resume: the SDK session whose transcript is forked, or None for a fresh one.
        resume_at: the uuid of the last message of it that counts, or None for all.
    """

    run_id: str
    sdk_session_id: str
    cwd: str
    prompt: str
    images: tuple[Image, ...]
    options: Mapping[str, Any]
    timeout_ms: int | None = None
    resume: str | None = None
    resume_at: str | None = None

    def user_message(self) -> dict[str, Any]:
        return user_message(self.sdk_session_id, self.prompt, self.images)


def user_message(sdk_session_id: str, prompt: str, images: Sequence[Image]) -> dict[str, Any]:
    """What a user says, as Claude Code reads it."""
    pictures = [
        {"type": "image", "source": {"type": "base64", "media_type": image.media_type, "data": image.data}}
        for image in images
    ]
    return {
        "type": "user",
        "message": {"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]},
        "parent_tool_use_id": None,
        "session_id": sdk_session_id,
    }


def sdk_options(
    context: RunContext,
    cli_config: CLIConfig,
    environ: Mapping[str, str],
    directory: Path,
    mirror: Mirror | None,
    *,
    ask: Ask | None = None,
) -> ClaudeAgentOptions:
    """The SDK's options of a run.

    Args:
        environ: what its agent inherits.
        directory: the run's own.
        ask: gets Claude Code's questions answered; it is not to ask if left out.

    Raises:
        UnusableOptionsError: what its request names cannot be used; the message says why.
    """
    arguments = sdk_arguments(
        cli_config.ceilings.lower(context.options),
        # Who wants to be asked wants to be asked about edits too.
        permission_mode=cli_config.permission_mode if ask is None else "default",
        setting_sources=cli_config.setting_sources,
        directory=directory,
        agent=AgentDefinition,
    )
    # A run's messages are to read as the whole conversation, the user's side too.
    arguments["extra_args"]["replay-user-messages"] = None
    inherited = {name: value for name, value in environ.items() if name not in arguments["env"]}
    arguments["env"] |= {
        **launch_environment(
            cli_config.cli_path, context.run_id, inherited, directory / STDERR_FILE, cli_config.open_files
        ),
        # Tells when a run is over: the first result is not the end while agents work in the background.
        "CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS": "1",
        # Claude Code leaves folders in it.
        "CLAUDE_CODE_TMPDIR": str(directory),
    }
    return ClaudeAgentOptions(
        cwd=context.cwd,
        cli_path=LAUNCH_SCRIPT,
        session_id=context.sdk_session_id,
        resume=context.resume,
        fork_session=context.resume is not None,
        resume_session_at=context.resume_at,
        max_buffer_size=cli_config.max_message_bytes,
        session_store=mirror,  # type: ignore[arg-type]  # the SDK wants no more of it, for a store of its own
        # As it grows: what is kept until the turn's end is lost with a service that is killed.
        session_store_flush="eager",
        can_use_tool=None if ask is None else permission_callback(ask),
        **arguments,
    )
