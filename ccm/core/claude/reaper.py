"""A small process beside the service that ends what its agents have left when the service is killed.

The kernel tells Claude Code of the service's death (core/launch_claude.sh), and Claude Code ends its tools. What that
misses is a tool in a session of its own whose Claude Code was killed as well, or was just starting it. So the reaper is
told which runs are going on; when its input ends, because the service has, it ends what still carries their marks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from ccm.core.claude.processes import end_marked, marked

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[3]
# Seconds that Claude Code gets to end by itself: it has a transcript to write.
GRACE_TIMEOUT = 5.0
# How long a reaper that has nothing left to do may take to end.
STOP_TIMEOUT = 5.0
# The reaper's commands, each followed by a run id: the run has started; it has ended and its remaining processes may
# stay; it has ended and they are to be killed.
GOING_ON, OVER, END = "+", "-", "!"


class Reaper:
    """Started with the first run; Linux only, for elsewhere no process shows its mark."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._runs: set[str] = set()

    def watch(self, run_id: str) -> None:
        """A run begins."""
        with self._lock:
            self._runs.add(run_id)
            self._tell(GOING_ON + run_id)

    def release(self, run_id: str) -> None:
        """A run is over, and what it has left may stay."""
        with self._lock:
            self._runs.discard(run_id)
            self._tell(OVER + run_id)

    def end(self, run_id: str) -> None:
        """A run is over, and its processes are to be ended, for the service itself cannot."""
        with self._lock:
            self._tell(END + run_id)
            self._runs.discard(run_id)

    def stop(self) -> None:
        """Let it go. Idempotent; it stays as long as runs are going on."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None and process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                if not self._runs:
                    _see_it_end(process, STOP_TIMEOUT)

    def _tell(self, line: str) -> None:
        if sys.platform != "linux":
            return
        if self._process is not None and self._process.poll() is None:
            if self._write([line]):
                return
            # It does not read: whoever waited for it would hold up every run.
            _see_it_end(self._process, 0)
        if not self._runs:
            return
        if self._process is not None:
            log.warning("the reaper has ended or stands still; another one takes its place")
        self._process = _start()
        self._write([*(GOING_ON + run_id for run_id in self._runs), line])

    def _write(self, lines: list[str]) -> bool:
        """Write whole lines, without waiting. False if it takes no more."""
        stream = None if self._process is None else self._process.stdin
        if stream is None:
            return False
        try:
            # A line is shorter than what a pipe takes or refuses as a whole.
            return all(stream.write(text) == len(text) for text in (f"{line}\n".encode("ascii") for line in lines))
        except OSError:
            return False


def _see_it_end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a reaper's end, and kill it then."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return
    process.kill()
    process.wait()


def _start() -> subprocess.Popen[bytes]:
    # -S: it needs no packages, and is to be small. Its own session: Ctrl-C at the terminal is not for it.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ccm.core.claude.reaper import reap; reap(sys.stdin)"
    process = subprocess.Popen(  # noqa: S603  # our own words only
        [sys.executable, "-I", "-S", "-c", code],
        stdin=subprocess.PIPE,
        # Who reads what the service says must not wait for the reaper's end.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env={},  # it needs none, and a mark in it would be its own end
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None  # noqa: S101  # for mypy: it is a pipe
    os.set_blocking(process.stdin.fileno(), False)
    return process


def reap(lines: IO[str]) -> None:
    """The reaper's own life: listen until the input ends, then end what is left of the runs that were going on."""
    runs: set[str] = set()
    for line in lines:
        sign, run_id = line[:1], line[1:].strip()
        if sign == GOING_ON:
            runs.add(run_id)
        else:
            runs.discard(run_id)
            if sign == END:
                with contextlib.suppress(OSError):  # nobody reads what this process says, and other runs need it
                    end_marked(run_id)
    deadline = time.monotonic() + GRACE_TIMEOUT
    while runs and time.monotonic() < deadline:
        runs = {run_id for run_id in runs if marked(run_id)}
        time.sleep(0.1)
    for run_id in runs:
        end_marked(run_id)
