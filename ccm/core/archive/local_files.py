"""Claude Code's own files of runs on this host: their transcripts, and those of their subagents beside them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ccm.core.archive.records import UUID
from ccm.core.claude.locations import config_directory, find_transcript
from ccm.errors import CommandRefused

# What stands in the directory of a project: a transcript, one that the service has set aside for it lacked something,
# the folder beside it, and what a service that was killed has left of writing one back. Nothing else is ever touched.
NAME = re.compile(
    rf"(?P<id>{UUID.pattern})(\.jsonl(\.incomplete-\d+)?)?|\.ccm-(?P<unfinished>{UUID.pattern})-.*", re.DOTALL
)


class LocalFiles:
    """
    Args:
        environ: what agents inherit; it tells where Claude Code keeps its files.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        # By Claude Code's directory and by SDK session; each directory is looked through once.
        self._found: dict[Path, dict[str, list[Path]]] = {}

    def has_transcript(self, cwd: str, sdk_session_id: str) -> bool:
        """Whether a run's transcript is there."""
        if not UUID.fullmatch(sdk_session_id) or not os.path.isabs(cwd):
            return False
        return find_transcript(cwd, sdk_session_id, self._environ) is not None

    def directories(self, cwd: str, own_environ: Mapping[str, str]) -> Iterator[Path]:
        """Where Claude Code, or the service for it, may have put files of a run.

        Args:
            own_environ: what the run changed in the environment of its agent.
        """
        for environ in (self._environ, {**self._environ, **own_environ}):
            directory = config_directory(environ)
            yield directory
            yield Path(cwd, directory)  # a relative one begins where the agent worked

    def of_sessions(self, sdk_session_ids: Iterable[str], directories: Iterable[Path]) -> list[Path]:
        """What is there of some SDK sessions, files and folders, for whichever project it was written.

        A fork has the transcript of its parent written for its own project too.

        Raises:
            CommandRefused: a directory cannot be read.
        """
        wanted = list(sdk_session_ids)
        found: dict[Path, None] = {}
        for directory in directories:
            if directory not in self._found:
                self._found[directory] = _look_through(directory / "projects")
            for sdk_session_id in wanted:
                found.update(dict.fromkeys(self._found[directory].get(sdk_session_id, [])))
        return sorted(found)


def _look_through(projects: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for project in _listed(projects):
        for path in _listed(project):
            if match := NAME.fullmatch(path.name):
                found.setdefault(match["id"] or match["unfinished"], []).append(path)
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return []  # ValueError: with a NUL in it there can be no such path
    except OSError as error:
        raise CommandRefused(
            f"{folder} cannot be read: {error.strerror}. It may have files of Claude Code that must go too; their tree "
            "is still there."
        ) from None


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
