"""Claude Code's own files of a run on this host: its transcript, and those of its subagents beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ccm.core.archive.records import UUID
from ccm.core.sdk import transcript_path


class LocalFiles:
    """
    Args:
        environ: what agents inherit; it tells where Claude Code keeps its files.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def has_transcript(self, cwd: str, sdk_session_id: str) -> bool:
        """Whether a run's transcript is there."""
        path = self._transcript(cwd, sdk_session_id, {})
        return path is not None and path.is_file()

    def of_run(self, cwd: str, sdk_session_id: str, own_environ: Mapping[str, str]) -> list[Path]:
        """What is there of a run: a file, a directory, both or nothing.

        Args:
            own_environ: what the run changed in the environment of its agent.
        """
        path = self._transcript(cwd, sdk_session_id, own_environ)
        if path is None:
            return []
        return [found for found in (path, path.with_suffix("")) if os.path.lexists(found)]

    def _transcript(self, cwd: str, sdk_session_id: str, own_environ: Mapping[str, str]) -> Path | None:
        # Nothing else is a name of Claude Code's, and a path of anyone's choice is never touched.
        if not UUID.fullmatch(sdk_session_id) or not os.path.isabs(cwd):
            return None
        return transcript_path(cwd, sdk_session_id, {**self._environ, **own_environ})


def count(path: Path) -> int:
    """How many files a path is or holds."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(files) for _, _, files in os.walk(path))


def remove(path: Path) -> None:
    """Delete a file, or a directory with all that is in it; of a link the link alone.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
