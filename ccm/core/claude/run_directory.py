"""The directory that each run has of its own: what is long or secret is given to Claude Code in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ccm.core.claude.regular_file import open_regular

# What Claude Code says on its stderr, and how much of it is told.
STDERR_FILE = "stderr"
STDERR_BYTES = 4_000


@contextmanager
def run_directory(run_id: str) -> Iterator[Path]:
    """The directory, readable by nobody else, gone with the run.

    Raises:
        OSError: it cannot be made.
    """
    directory = Path(tempfile.mkdtemp(prefix=f"ccm-{run_id}-"))
    try:
        # Made here, where it is told why that fails; the shell that starts Claude Code would end without a word.
        (directory / STDERR_FILE).touch(mode=0o600)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def remove_directories(run_id: str) -> None:
    """Remove what a run has left whose service was killed: its prompts and settings may hold secrets."""
    for directory in Path(tempfile.gettempdir()).glob(f"ccm-{run_id}-*"):
        shutil.rmtree(directory, ignore_errors=True)


def said_on_stderr(directory: Path) -> str:
    """The end of what Claude Code said there."""
    file = directory / STDERR_FILE
    try:
        with open_regular(file) as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - STDERR_BYTES))
            return stream.read(STDERR_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        return ""
