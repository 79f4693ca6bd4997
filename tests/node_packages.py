"""The Node.js packages of tests/node/, installed once for all test processes."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from pathlib import Path

PACKAGES = Path(__file__).with_name("node")


def install(npm: str, folder: Path) -> Path:
    """Copy tests/node/ to a directory and install its packages there, unless that was done. Return the directory.

    Args:
        npm: the path of npm.
        folder: an existing directory, which outlasts the tests.

    Raises:
        AssertionError: npm failed; has what it printed.
    """
    lock_file = (PACKAGES / "package-lock.json").read_text(encoding="utf-8")
    installed = folder / "installed.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes may run side by side
        shutil.copytree(PACKAGES, folder, dirs_exist_ok=True)
        if not installed.exists() or installed.read_text(encoding="utf-8") != lock_file:
            installed.unlink(missing_ok=True)
            run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder)
            installed.write_text(lock_file, encoding="utf-8")
    return folder


def run(words: list[str], folder: Path) -> str:
    """Run a program in a directory, to its end. Return its output.

    Raises:
        AssertionError: it failed; has what it printed.
    """
    ran = subprocess.run(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert ran.returncode == 0, f"{words} ended with {ran.returncode}:\n{ran.stdout}"
    return ran.stdout
