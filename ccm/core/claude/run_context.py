"""The inputs of one run: its context, the Claude Code to run, and the SDK's options that result from both."""

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
    """The SDK's session store for one run (core/transcripts/store.py). Receives the transcript as it grows."""

    @property
    def busy(self) -> bool:
        """Whether entries are being stored."""


@dataclass(frozen=True)
class CLIConfig:
    """The Claude Code to run, and the settings of all runs.

    Args:
        open_files: the agents' limit of open files; None for the service's own.
    """

    cli_path: Path
    permission_mode: str
    setting_sources: tuple[str, ...]
    max_message_bytes: int
    ceilings: Ceilings = Ceilings()
    open_files: int | None = None

    def missing(self) -> str | None:
        """Return why Claude Code cannot be started, or None."""
        if not self.cli_path.is_file():
            return f"Claude Code is not at {self.cli_path}; reinstall claude-agent-sdk or set CCM_CLI_PATH."
        if not os.access(self.cli_path, os.X_OK):
            return f"This user has no permission to execute Claude Code at {self.cli_path}."
        return None


@dataclass(frozen=True)
class RunContext:
    """One run, as `Execution` receives it.

    Args:
        timeout_ms: the time limit of its request, or None.
        resume: the SDK session whose transcript is forked, or None for a fresh run.
        resume_at: the uuid of the last message that is taken from that transcript, or None for all messages.
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
    """Return a user's message in the format that Claude Code reads."""
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
    """Return the SDK's options of a run.

    Args:
        environ: the environment that its agent inherits.
        directory: the run's own directory.
        ask: answers permission requests; without it Claude Code does not send any.

    Raises:
        UnusableOptionsError: a value in the request cannot be used; the message says why.
    """
    arguments = sdk_arguments(
        cli_config.ceilings.lower(context.options),
        # With approvals, edits need approval too, so the service's own mode does not apply.
        permission_mode=cli_config.permission_mode if ask is None else "default",
        setting_sources=cli_config.setting_sources,
        directory=directory,
        agent=AgentDefinition,
    )
    # The recorded messages must include the user's, so that they read as the whole conversation.
    arguments["extra_args"]["replay-user-messages"] = None
    inherited = {name: value for name, value in environ.items() if name not in arguments["env"]}
    arguments["env"] |= {
        **launch_environment(
            cli_config.cli_path, context.run_id, inherited, directory / STDERR_FILE, cli_config.open_files
        ),
        # Shows when a run is over: the first result is not the end while agents work in the background.
        "CLAUDE_CODE_EMIT_SESSION_STATE_EVENTS": "1",
        # Claude Code leaves files in its temporary directory; here they are removed with the run's.
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
        session_store=mirror,  # type: ignore[arg-type]  # the SDK needs only its append and load
        # Entries that the SDK held back until the end of the turn would be lost if the service were killed.
        session_store_flush="eager",
        can_use_tool=None if ask is None else permission_callback(ask),
        **arguments,
    )
