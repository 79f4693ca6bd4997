"""The facts about a git repository that Claude Code tells the model when it starts.

They are its branch, main branch, user, status and last commits. Only git itself can tell the status: a look at the
index would miss files that are new, ignored or changed in place.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import IO, cast

TIMEOUT = 1.0
# Claude Code shows 2,000 characters of the status.
MAX_OUTPUT = 1024 * 1024
# As Claude Code runs git: a repository's own programs do not run.
GIT = (
    *("git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=", "-c", "safe.bareRepository=explicit"),
    *("-c", "log.showSignature=false"),
)
GIT_ENVIRON = {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1"}
COMMANDS = (
    ("config", "--list", "--show-scope", "-z"),
    ("status", "--short", "--branch", "--no-ahead-behind", "--ignore-submodules=dirty"),
    ("log", "--oneline", "-n", "5"),
    (
        "for-each-ref",
        "--format=%(refname) %(symref)",
        *(f"refs/remotes/origin/{name}" for name in ("HEAD", "main", "master")),
    ),
)
# Claude Code ignores the filters of the repository's own configuration, which these commands do not.
OWN_FILTER = re.compile(rb"(?:^|\0)(?:local|worktree)\0filter\.")


def git_facts(cwd: str, environ: Mapping[str, str], timeout: float = TIMEOUT) -> bytes | None:
    """Return what git says about the repository of `cwd`, or that there is none; equal if all the facts are equal.

    Args:
        timeout: seconds. A large repository may take longer.

    Returns:
        None if it takes too long, says too much, cannot run, or may say something else to Claude Code.
    """
    deadline = time.monotonic() + timeout
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes += (_start(command, cwd, environ) for command in COMMANDS)
        outputs = [_read(process, deadline) for process in processes]
    except (OSError, subprocess.TimeoutExpired):
        return None
    finally:
        for process in processes:
            _end(process)
    return None if OWN_FILTER.search(outputs[0]) else b"\0\0".join(outputs)


def _start(command: tuple[str, ...], cwd: str, environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603  # no input from outside
        [*GIT, *command],
        cwd=cwd,
        env={**environ, **GIT_ENVIRON},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )


def _read(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """Return the output and the exit code of a process.

    Raises:
        OSError: it wrote too much, or took too long.
        TimeoutExpired: it closed its output and did not end.
    """
    stdout = cast("IO[bytes]", process.stdout)
    output = bytearray()
    poll = select.poll()
    poll.register(stdout, select.POLLIN)
    while len(output) <= MAX_OUTPUT and poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        chunk = os.read(stdout.fileno(), 65536)
        if not chunk:
            return bytes(output) + b"\0%d" % process.wait(max(0.0, deadline - time.monotonic()))
        output += chunk
    raise OSError("git wrote too much or took too long")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, with those that it started, unless it has ended."""
    cast("IO[bytes]", process.stdout).close()
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
