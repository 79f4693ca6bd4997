"""A small process beside the service that ends the processes of agents when the service is killed.

If the service dies, the kernel signals Claude Code (`processes.launch_prefix`), which ends its tools. That misses a
tool in a process session of its own (setsid) if Claude Code was killed as well or was just starting the tool. The
reaper therefore knows which runs have started. When its input ends, because the service has ended, it kills every
process with the mark of one of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import IO

from ccm.core.claude.processes import end_marked, marked
from ccm.core.claude.run_directory import remove_directories

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[3]
# How long Claude Code may take to end by itself, because it still writes its transcript (seconds).
GRACE_TIMEOUT = 5.0
# How long an idle reaper may take to end (seconds).
STOP_TIMEOUT = 5.0
# The reaper's commands, each followed by a run id: the run has started; it has ended and its remaining processes may
# stay; it has ended and its remaining processes must be killed.
WATCH, RELEASE, END = "+", "-", "!"


class Reaper:
    """The service's handle on its reaper process, which starts with the first run.

    Linux only: elsewhere a process's mark cannot be read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        # How often each run is watched: a Claude Code that was started for it may be ending while the run begins.
        self._runs: Counter[str] = Counter()

    def watch(self, run_id: str) -> None:
        """Watch a run that begins, or a Claude Code that is started for it in advance."""
        with self._lock:
            self._runs[run_id] += 1
            self._send(WATCH + run_id)

    def release(self, run_id: str) -> None:
        """Undo one `watch`. After the last one the remaining processes may stay."""
        with self._lock:
            if self._runs[run_id] > 1:
                self._runs[run_id] -= 1
                return
            del self._runs[run_id]
            self._send(RELEASE + run_id)

    def end(self, run_id: str) -> None:
        """Kill the processes of a run that is over, because the service itself cannot."""
        with self._lock:
            self._send(END + run_id)
            del self._runs[run_id]

    def stop(self) -> None:
        """Close the reaper's input. It ends at once, or after it has ended the runs that it watches. Idempotent."""
        with self._lock:
            process, self._process = self._process, None
            if process is not None and process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                if not self._runs:
                    _wait_or_kill(process, STOP_TIMEOUT)

    def _send(self, line: str) -> None:
        """Send a command. Replaces a reaper that has ended or does not read."""
        if sys.platform != "linux":
            return
        if self._process is not None and self._process.poll() is None:
            if self._write([line]):
                return
            # It does not read. Waiting for it would block every run.
            _wait_or_kill(self._process, 0)
        if not self._runs:
            return
        if self._process is not None:
            log.warning("the reaper has ended or does not respond, replacing it", extra={"event": "reaper_replaced"})
        self._process = _start()
        self._write([*(WATCH + run_id for run_id in self._runs), line])

    def _write(self, lines: list[str]) -> bool:
        """Write whole lines without waiting. Returns False if the pipe is full or closed."""
        stream = None if self._process is None else self._process.stdin
        if stream is None:
            return False
        try:
            # A line is short enough that a pipe takes it whole or not at all.
            return all(stream.write(text) == len(text) for text in (f"{line}\n".encode("ascii") for line in lines))
        except OSError:
            return False


def _wait_or_kill(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for a reaper to end. Kill it after `seconds`."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return
    process.kill()
    process.wait()


def _start() -> subprocess.Popen[bytes]:
    # -S keeps it small: it needs no packages. In a session of its own, Ctrl-C at the terminal does not reach it.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from ccm.core.claude.reaper import reap; reap(sys.stdin)"
    process = subprocess.Popen(  # noqa: S603  # no input from outside
        [sys.executable, "-I", "-S", "-c", code],
        stdin=subprocess.PIPE,
        # If it held the service's output open, readers of that output would wait for the reaper's end.
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env={"TMPDIR": tempfile.gettempdir()},  # with a mark in its environment it would kill itself
        cwd="/",
        start_new_session=True,
    )
    assert process.stdin is not None  # noqa: S101  # for mypy: it is a pipe
    os.set_blocking(process.stdin.fileno(), False)
    return process


def reap(lines: IO[str]) -> None:
    """Execute commands until the input ends, then end the processes of the runs that are still watched.

    Called in the reaper process.
    """
    runs: set[str] = set()
    for line in lines:
        command, run_id = line[:1], line[1:].strip()
        if command == WATCH:
            runs.add(run_id)
        else:
            runs.discard(run_id)
            if command == END:
                with contextlib.suppress(OSError):  # this process has no log, and other runs still need it
                    end_marked(run_id)
    watched = set(runs)
    deadline = time.monotonic() + GRACE_TIMEOUT
    while runs and time.monotonic() < deadline:
        runs = {run_id for run_id in runs if marked(run_id)}
        time.sleep(0.1)
    for run_id in runs:
        end_marked(run_id)
    for run_id in watched:
        remove_directories(run_id)  # the next start of the service knows those of runs only, not of spares
