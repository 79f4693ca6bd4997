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

LAUNCH_SCRIPT = Path(__file__).with_name("launch_claude.sh")
# Every process of a run inherits this variable: a tool may leave Claude Code's process group, but not its environment.
RUN_MARK = "CCM_RUN_ID"
# Variables that are hidden from the agent: the service's settings, and the access to its database.
HIDDEN_PREFIXES = ("CCM_", "PG")
HIDDEN_NAMES = ("DATABASE_URL", "DATABASE_PATH")


def launcher() -> str:
    """Return the command prefix that separates Claude Code from the service; empty if the system has no such programs.

    Without `setpriv` (Linux only) agents outlive a killed service. Without `setsid` Ctrl-C at the terminal ends them.
    """
    words = []
    if setsid := shutil.which("setsid"):
        words += [setsid]
    if sys.platform == "linux" and (setpriv := shutil.which("setpriv")):
        words += [setpriv, "--pdeathsig", "TERM", "--"]
    return " ".join(words)


def launch_environment(
    claude: Path, run_id: str, environ: Mapping[str, str], stderr: Path, open_files: int | None = None
) -> dict[str, str]:
    """Return the variables that the launch script reads, and the mark of the run."""
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
