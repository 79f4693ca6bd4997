"""Finds and deletes Claude Code's own files of runs on this host: transcripts, and those of subagents beside them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ccm.core.archive.records import UUID
from ccm.core.claude.locations import config_directory, find_transcript
from ccm.errors import CommandRefused

# The files in a project's directory that belong to an SDK session: its transcript, an incomplete transcript that the
# service set aside, the folder of its subagents, and the temporary file of a service that was killed while it wrote a
# transcript back. Nothing else is ever deleted.
NAME = re.compile(
    rf"(?P<id>{UUID.pattern})(\.jsonl(\.incomplete-\d+)?)?|\.ccm-(?P<unfinished>{UUID.pattern})-.*", re.DOTALL
)


class LocalFiles:
    """Claude Code's files on this host.

    Args:
        environ: the environment that agents inherit, which decides where Claude Code keeps its files.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        # Paths by configuration directory and SDK session id. Each directory is scanned once.
        self._paths: dict[Path, dict[str, list[Path]]] = {}

    def has_transcript(self, cwd: str, sdk_session_id: str) -> bool:
        """Return whether Claude Code has the transcript of a run with this cwd and SDK session id."""
        if not UUID.fullmatch(sdk_session_id) or not os.path.isabs(cwd):
            return False
        return find_transcript(cwd, sdk_session_id, self._environ) is not None

    def directories(self, cwd: str, own_environ: Mapping[str, str]) -> Iterator[Path]:
        """Yield the configuration directories in which Claude Code or the service may have written files of a run.

        Args:
            own_environ: the variables that the run's `env` option set.
        """
        for environ in (self._environ, {**self._environ, **own_environ}):
            directory = config_directory(environ)
            yield directory
            yield Path(cwd, directory)  # a relative directory is resolved in the agent's cwd

    def of_sessions(self, sdk_session_ids: Iterable[str], directories: Iterable[Path]) -> list[Path]:
        """Return the files and folders of SDK sessions, sorted, in the directories of all projects.

        All, because a fork writes its parent's transcript into the directory of its own project too.

        Raises:
            CommandRefused: a directory cannot be read.
        """
        wanted = list(sdk_session_ids)
        found: dict[Path, None] = {}
        for directory in directories:
            if directory not in self._paths:
                self._paths[directory] = _scan(directory / "projects")
            for sdk_session_id in wanted:
                found.update(dict.fromkeys(self._paths[directory].get(sdk_session_id, [])))
        return sorted(found)


def _scan(projects: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for project in _list_directory(projects):
        for path in _list_directory(project):
            if match := NAME.fullmatch(path.name):
                found.setdefault(match["id"] or match["unfinished"], []).append(path)
    return found


def _list_directory(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return []  # ValueError: a path with a NUL cannot exist
    except OSError as error:
        raise CommandRefused(
            f"{folder} cannot be read: {error.strerror}. It may have files of Claude Code that must go too; their tree "
            "is still there."
        ) from None


def count(path: Path) -> int:
    """Return the number of files at a path: 1 for a file or a link, else those below the folder."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(files) for _, _, files in os.walk(path))


def remove(path: Path) -> None:
    """Delete a file, a link (not its target), or a directory with its content.

    Raises:
        OSError: it cannot be deleted.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
