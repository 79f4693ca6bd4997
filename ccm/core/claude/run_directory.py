"""Each run's own directory, which passes long or secret values to Claude Code."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from ccm.core.claude.regular_file import open_regular

# The file that takes Claude Code's stderr, and how much of its end an error message shows (bytes).
STDERR_FILE = "stderr"
STDERR_BYTES = 4_000


def new_run_directory(run_id: str) -> Path:
    """Create a run's directory, readable by its owner only.

    Raises:
        OSError: it cannot be created.
    """
    directory = Path(tempfile.mkdtemp(prefix=f"ccm-{run_id}-"))
    try:
        # Created here, where a failure is told from one of Claude Code's start.
        (directory / STDERR_FILE).touch(mode=0o600)
    except OSError:
        remove_run_directory(directory)
        raise
    return directory


def remove_run_directory(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)


def remove_directories(run_id: str) -> None:
    """Remove the directory of a run whose service was killed: its prompts and settings may hold secrets."""
    for directory in Path(tempfile.gettempdir()).glob(f"ccm-{run_id}-*"):
        remove_run_directory(directory)


def read_stderr(directory: Path) -> str:
    """Return the end of Claude Code's stderr; empty if it cannot be read."""
    file = directory / STDERR_FILE
    try:
        with open_regular(file) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - STDERR_BYTES))
            return stream.read(STDERR_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        return ""
