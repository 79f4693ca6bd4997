"""What the machine has left: memory and processor time. Linux only; elsewhere nothing is known."""

from __future__ import annotations

import os
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Return the bytes that new processes can take without swapping, within the cgroup's limit; None if unknown."""
    found = [bytes_left for bytes_left in (_of_machine(), _of_cgroup()) if bytes_left is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def _of_cgroup() -> int | None:
    """Return what the limits of the service's cgroup and of those above it leave (cgroup v2)."""
    try:
        own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return None
    directory = CGROUPS / own.lstrip("/")
    found = [_left(group) for group in (directory, *directory.parents) if group.is_relative_to(CGROUPS)]
    return min((left for left in found if left is not None), default=None)


def _left(group: Path) -> int | None:
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(statistics["inactive_file"])  # cached files give way
    except (OSError, ValueError, KeyError):
        return None  # it has no limit: "max", or no such file


class ProcessorTime:
    """Measures how much of the processors is idle."""

    def __init__(self) -> None:
        self._last = self._idle_seconds(), time.monotonic()

    def idle_cores(self) -> float | None:
        """Return how many cores were idle on average since the last call; None if unknown."""
        before, since = self._last
        self._last = now, at = self._idle_seconds(), time.monotonic()
        return None if before is None or now is None or at <= since else (now - before) / (at - since)

    @staticmethod
    def _idle_seconds() -> float | None:
        try:
            fields = Path("/proc/stat").read_text().split(maxsplit=6)
            return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")  # idle, and waiting for a disk
        except (OSError, IndexError, ValueError):
            return None
