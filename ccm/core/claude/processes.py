"""The processes of a run: how Claude Code is launched, and how every process of the run is found and ended."""

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

from ccm.core.run_log import RunLog

log = logging.getLogger(__name__)

# Every process of a run inherits this variable: a tool may leave Claude Code's process group, but not its environment.
RUN_MARK = "CCM_RUN_ID"
# Variables that are hidden from the agent: the service's settings, and the access to its database.
HIDDEN_PREFIXES = ("CCM_", "PG")
HIDDEN_NAMES = ("DATABASE_URL", "DATABASE_PATH")
# What a Claude Code or an SDK passes on to the programs that it starts, if the service itself is one of them.
OUTER_SESSION = ("CLAUDECODE", "CLAUDE_AGENT_SDK_DERIVED_CLIENT_APP")


def launch_prefix() -> tuple[str, ...]:
    """Return the command that executes Claude Code so that the kernel ends it when the service dies.

    It is empty if the system has no `setpriv` (Linux only): then agents outlive a killed service.
    """
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    return () if setpriv is None else (setpriv, "--pdeathsig", "TERM", "--")


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of the service that an agent inherits: not its settings, nor the access to its database."""
    hidden = (*HIDDEN_NAMES, *OUTER_SESSION)
    return {
        name: value for name, value in environ.items() if name not in hidden and not name.startswith(HIDDEN_PREFIXES)
    }


def marked(run_id: str, holding: str | None = None) -> list[int]:
    """Return the pids of all processes that carry a run's mark. Linux only; elsewhere none is found.

    Args:
        holding: only processes that have this file open, as /proc names it: `pipe:[123]`.
    """
    mark = f"{RUN_MARK}={run_id}".encode()
    pids = []
    for entry in os.scandir("/proc") if sys.platform == "linux" else ():
        if not entry.name.isdigit():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes()
        except OSError:
            continue  # the process has ended or belongs to another user
        if mark in environment.split(b"\0") and (holding is None or holding in _open_files(entry.path)):
            pids.append(int(entry.name))
    return pids


def _open_files(process: str) -> set[str]:
    """Return the open files of a process, as /proc names them.

    Args:
        process: the process's directory in /proc.
    """
    names = set()
    try:
        for entry in os.scandir(Path(process, "fd")):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                names.add(os.readlink(entry.path))
    except OSError:
        pass  # the process has ended or belongs to another user
    return names


def end_marked(run_id: str, seconds: float = 5.0, holding: str | None = None) -> None:
    """Kill the remaining processes of a run: a tool in a session of its own survives Claude Code.

    Args:
        seconds: how long to wait until they have ended.
        holding: as for `marked`.
    """
    run_log = RunLog(log, run_id)
    deadline = time.monotonic() + seconds
    pids = marked(run_id, holding)
    reported: set[int] = set()
    while pids and time.monotonic() < deadline:
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            except PermissionError:
                if pid not in reported:
                    run_log.warning("no permission to end process %d", pid, event="kill_refused")
                reported.add(pid)
        time.sleep(0.01)
        pids = marked(run_id, holding)
    if pids:
        run_log.error("processes %s have not ended", ", ".join(map(str, pids)), event="kill_failed")
