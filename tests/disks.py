"""A small file system that a test can fill."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


class SmallDisk:
    """A tmpfs of 2 MiB, mounted while its context is open. Only root may mount: other users skip the test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> SmallDisk:
        self.path.mkdir()
        self._mount("size=2m", "-t", "tmpfs", "none")
        return self

    def __exit__(self, *_: object) -> None:
        # Lazily: a failed test may have files open, and pytest cannot delete a mount point.
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
        """Return the bytes in use, including those of deleted files that are still open."""
        room = os.statvfs(self.path)
        return (room.f_blocks - room.f_bfree) * room.f_frsize

    def fill(self) -> None:
        """Fill the file system."""
        with (self.path / "filler").open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                return

    def grow(self) -> None:
        """Enlarge the file system to 64 MiB."""
        self._mount("remount,size=64m")

    def make_read_only(self) -> None:
        self._mount("remount,ro")
