"""A digest of files by which a later reader notices that any of them has changed, appeared or gone."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from ccm.core.claude.regular_file import open_regular

MAX_FILES = 5_000
MAX_BYTES = 16 * 1024 * 1024
# Of a larger file only the status counts.
MAX_FILE_BYTES = 1024 * 1024

SKIPPED = (".git", "node_modules")
# Claude Code parses Markdown and sees fewer imports; a file that does not exist costs little.
IMPORT = re.compile(r"@((?:[^\s\\]|\\ )+)")
AFTER_IMPORT = re.compile(r"[`*_~)\]}>\"'#,;:!?|<(]")


class UnknownStateError(Exception):
    """The state is not known from files, or reading them would take too long; the message says why."""


class FileDigest:
    """Reads each file once and digests its path, status and content, or the error.

    The status counts because a file that was changed and changed back may have been read in between; the content,
    because two changes may fall into one tick of the clock.

    Args:
        home: what `~` means in imports.
        is_telling: whether the path and the content of a file tell all that matters; otherwise the state is unknown.
    """

    def __init__(self, home: Path, is_telling: Callable[[Path, bytes], bool]) -> None:
        self._home = home
        self._is_telling = is_telling
        self._hash = hashlib.blake2b(digest_size=32)
        # The files that were read; of those over the limit None.
        self._contents: dict[Path, bytes | None] = {}
        self._folders: set[Path | tuple[int, int]] = set()
        self._followed: set[Path] = set()
        self._bytes = 0

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def add(self, *values: object) -> None:
        """Add values of which `repr` says all."""
        self._hash.update(repr(values).encode("utf-8", "surrogatepass"))

    def add_file(self, path: Path, *, whole: bool = False, check: bool = True) -> bytes:
        """Add a file, unless it was added before, and return its content: empty if it cannot be read or is too large.

        Args:
            whole: the content is needed.
            check: whether it has to be telling.

        Raises:
            UnknownStateError: there are too many files or bytes, the content is needed, or it does not tell all.
        """
        if path not in self._contents:
            self._contents[path] = self._read(path)
            if len(self._contents) > MAX_FILES:
                raise UnknownStateError("there are too many files")
        content = self._contents[path]
        if content is None and whole:
            raise UnknownStateError(f"{path} is too large")
        if check and content and not self._is_telling(path, content):
            raise UnknownStateError(f"{path} does not tell all")
        return content or b""

    def _read(self, path: Path) -> bytes | None:
        try:
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                content = b"" if status.st_size > MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: the path has a NUL
            self.add(str(path), getattr(error, "errno", None))
            return b""
        self.add(str(path), *signature(status))
        if max(status.st_size, len(content)) > MAX_FILE_BYTES:
            return None
        self._bytes += len(content)
        if self._bytes > MAX_BYTES:
            raise UnknownStateError("there is too much to read")
        self.add(content)
        return content

    def add_tree(self, root: Path, *, imports: bool = False, check: bool = True) -> None:
        """Add all files under a directory.

        Args:
            imports: add what they import too.
            check: whether they have to be telling.
        """
        pending = [root]
        while pending:
            path = pending.pop()
            if path in self._folders:
                continue
            self._folders.add(path)
            if len(self._folders) > MAX_FILES:
                raise UnknownStateError("there are too many directories")
            try:
                status = os.stat(path)
                with os.scandir(path) as entries:
                    found = sorted((entry.name, _leads_to_directory(entry)) for entry in entries)
            except OSError as error:
                self.add(str(path), error.errno)
                continue
            identity = (status.st_dev, status.st_ino)
            self.add(str(path), identity)
            if identity in self._folders:  # reached through another path, maybe from inside
                continue
            self._folders.add(identity)
            for name, is_directory in found:
                if name in SKIPPED:
                    continue
                if is_directory:
                    pending.append(path / name)
                elif imports:
                    self.add_instructions(path / name)
                else:
                    self.add_file(path / name, check=check)

    def add_instructions(self, root: Path) -> None:
        """Add a text file and all that it imports with `@path`. Claude Code stops at a depth of five."""
        pending = [root]
        while pending:
            path = pending.pop()
            if path in self._followed:
                continue
            self._followed.add(path)
            text = self.add_file(path, whole=True).decode("utf-8", "surrogateescape")
            if "@" in text:
                folders = sorted({path.parent, Path(os.path.realpath(path)).parent})
                pending += [folder / name for name in self._imported(text) for folder in folders]

    def _imported(self, text: str) -> list[Path]:
        """Return all paths that a text may import, relative ones as they are."""
        names: dict[str, None] = {}
        for match in IMPORT.finditer(text):
            name = match.group(1).replace("\\ ", " ")
            for end in (*(cut.start() for cut in AFTER_IMPORT.finditer(name)), len(name)):
                names[name[:end]] = None
        return [self._home / name[2:] if name.startswith("~/") else Path(name) for name in names if name]


def signature(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes whenever a file is changed or replaced."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _leads_to_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # symbolic links in a circle
        return False
