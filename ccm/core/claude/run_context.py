"""The inputs of one run: its context, and the Claude Code to run."""

from __future__ import annotations

import os
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ccm.core.policy.ceilings import Ceilings
from ccm.models import Answer, Image, Question

Ask = Callable[[Question], Awaitable[Answer]]


class Transcript(Protocol):
    """The copy of one run's transcript (core/transcripts/copying.py)."""

    async def copy(self, at_result: bool) -> None:
        """Copy what Claude Code has written since the last copy; at a result it may wait. A failure is logged."""


@dataclass(frozen=True)
class CLIConfig:
    """The Claude Code to run, and the settings of all runs.

    Args:
        environ: the environment that agents inherit.
        open_files: the agents' limit of open files; None for the service's own.
    """

    cli_path: Path
    environ: Mapping[str, str] = field(repr=False)
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


def user_message(sdk_session_id: str, prompt: str, images: Sequence[Image]) -> dict[str, Any]:
    """Return a user's message in the format that Claude Code reads, with a uuid of its own."""
    pictures = [
        {"type": "image", "source": {"type": "base64", "media_type": image.media_type, "data": image.data}}
        for image in images
    ]
    return {
        "type": "user",
        "message": {"role": "user", "content": [*pictures, {"type": "text", "text": prompt}]},
        "parent_tool_use_id": None,
        "session_id": sdk_session_id,
        "uuid": str(uuid.uuid4()),
    }
