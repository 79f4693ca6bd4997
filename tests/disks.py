"""A file system of its own that is soon full."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A tmpfs of 2 MiB, mounted while its context lasts. Only root may mount; elsewhere its test is skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> SmallDisk:
        self.path.mkdir()
        self._mount("size=2m", "-t", "tmpfs", "none")
        return self

    def __exit__(self, *_: object) -> None:
        # Lazily: a test that failed may have files open, and pytest cannot remove what is mounted.
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def _mount(self, options: str, *words: str) -> None:
        result = subprocess.run(
            ["mount", "-o", options, *words, str(self.path)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            if os.environ.get("CI"):
                pytest.fail(f"CI must be able to mount a tmpfs: {result.stderr}")
            pytest.skip(f"a tmpfs cannot be mounted here: {result.stderr.strip()}")

    def used(self) -> int:
        """How many bytes files take, those included that have no name any more."""
        room = os.statvfs(self.path)
        return (room.f_blocks - room.f_bfree) * room.f_frsize

    def fill(self) -> None:
        """Take all the room that is left."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                return

    def grow(self) -> None:
        """Make room for 64 MiB."""
        self._mount("remount,size=64m")

    def make_read_only(self) -> None:
        self._mount("remount,ro")
