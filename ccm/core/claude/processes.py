"""The processes of a run: how Claude Code is started, and how nothing of it is left behind."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

LAUNCH_SCRIPT = Path(__file__).with_name("launch_claude.sh")
# Every process of a run inherits it: a tool may leave Claude Code's process group, but not its environment.
RUN_MARK = "CCM_RUN_ID"
# What the agent has no business with: the service's settings, and how to reach its database.
HIDDEN_PREFIXES = ("CCM_", "PG")
HIDDEN_NAMES = ("DATABASE_URL", "DATABASE_PATH")


def launcher() -> str:
    """The programs that start Claude Code apart from the service; empty where the system has none.

    Without `setpriv` (it is Linux's) agents outlive a service that is killed; without `setsid` Ctrl-C at the terminal
    reaches them too.
    """
    words = []
    setsid = shutil.which("setsid")
    if setsid:
        words += [setsid]
    setpriv = shutil.which("setpriv")
    if setpriv and sys.platform == "linux":
        words += [setpriv, "--pdeathsig", "TERM", "--"]
    return " ".join(words)


def launch_environment(
    claude: Path, run_id: str, environ: Mapping[str, str], stderr: Path, open_files: int | None = None
) -> dict[str, str]:
    """What the launch script reads, and the mark of the run."""
    hidden = [
        name
        for name in environ
        if (name.startswith(HIDDEN_PREFIXES) or name in HIDDEN_NAMES) and name != RUN_MARK and name.isidentifier()
    ]
    return {
        "CCM_LAUNCHER": launcher(),
        "CCM_CLAUDE": str(claude),
        "CCM_STDERR": str(stderr),
        "CCM_HIDDEN": " ".join(hidden),
        "CCM_OPEN_FILES": "" if open_files is None else str(open_files),
        RUN_MARK: run_id,
    }


def marked(run_id: str, holding: str | None = None) -> list[int]:
    """The pids of all processes that carry a run's mark. Linux only: elsewhere none is found.

    Args:
        holding: only those that have this open, as /proc names it: `pipe:[123]`.
    """
    mark = f"{RUN_MARK}={run_id}".encode()
    pids = []
    for entry in os.scandir("/proc") if sys.platform == "linux" else ():
        if not entry.name.isdigit():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes()
        except OSError:
            continue  # it has ended, or is another user's
        if mark in environment.split(b"\0") and (holding is None or holding in _open_files(entry.path)):
            pids.append(int(entry.name))
    return pids


def _open_files(process: str) -> set[str]:
    """What the process of a folder in /proc has open, by the names that /proc has for it."""
    names = set()
    try:
        for entry in os.scandir(Path(process, "fd")):
            with contextlib.suppress(FileNotFoundError):  # closed since
                names.add(os.readlink(entry.path))
    except OSError:
        pass  # it has ended, or is another user's
    return names


def end_marked(run_id: str, seconds: float = 5.0, holding: str | None = None) -> None:
    """Kill what a run has left behind: a tool survives the death of Claude Code in a session of its own.

    Args:
        seconds: how long to wait for the killed to be gone.
        holding: as for `marked`.
    """
    deadline = time.monotonic() + seconds
    pids = marked(run_id, holding)
    told: set[int] = set()
    while pids and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            except PermissionError:
                if pid not in told:
                    log.warning("run %s: process %d may not be ended: it is another user's", run_id, pid)
                told.add(pid)
        time.sleep(0.01)
        pids = marked(run_id, holding)
    if pids:
        log.error("run %s: processes %s would not end", run_id, ", ".join(map(str, pids)))
