"""Programs of the system that some tests need, and the ports that they listen on."""

from __future__ import annotations

import os
import shutil
import socket

import pytest


def program(name: str, package: str) -> str:
    """The path of a program. Without it the test is skipped, and in CI it fails: `.ci/run` installs it.

    Args:
        package: Debian's package that has it.
    """
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"]))
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs {name}: install Debian's package {package}")
        pytest.skip(f"{name} is not installed; Debian's package {package} has it")
    return found


def free_port() -> int:
    """A port that nobody listens on, for a program that cannot choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
