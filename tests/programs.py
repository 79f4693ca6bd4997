"""System programs that some tests need, the ports that they listen on, and what /proc says of processes."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """Return the path of a program; without it skip the test, or in CI fail it, because `.ci/run` installs it.

    Args:
        package: the Debian package of the program.
    """
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs {name}: install Debian's package {package}")
        pytest.skip(f"{name} is not installed; Debian's package {package} has it")
    return found


def free_port() -> int:
    """Return a port on which no program listens, for a program that cannot choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def resident_memory(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def marks_in(home: Path) -> list[str]:
    """Return the run ids in the environments of the processes with this HOME."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended, or belongs to another user
        if f"HOME={home}".encode() in variables:
            found += [text[11:].decode() for text in variables if text.startswith(b"CCM_RUN_ID=")]
    return found
