"""What one run is made from: the assignment, and the Claude Code that is to do it."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
