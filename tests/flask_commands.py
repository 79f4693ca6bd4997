"""Commands of the service as processes, and the `flask` commands in the test's process, which saves a second each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from ccm.cli import COMMANDS
from ccm.testing.service_process import APP

FLASK = [sys.executable, "-m", "flask"]
BY_NAME = {command.name: command for command in COMMANDS}


def variables(url: str) -> dict[str, str]:
    """Return the settings that select a database."""
    return {"DATABASE_PATH": url.removeprefix("sqlite:///")} if url.startswith("sqlite") else {"DATABASE_URL": url}


@dataclass(frozen=True)
class CommandResult:
    """The outcome of a command."""

    returncode: int
    stdout: str
    stderr: str


def call(
    words: list[str], environ: Mapping[str, str], cwd: Path = APP.parent, **variables: object
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with the variables in addition to `environ`."""
    own = {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        words, env={**environ, **own}, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


class Flask:
    """Calls `flask` commands.

    Args:
        home: the HOME of the agents.
    """

    def __init__(self, home: Path) -> None:
        self._environ = {"HOME": str(home), "CLAUDE_CONFIG_DIR": None, "DATABASE_URL": None, "DATABASE_PATH": None}

    def __call__(self, url: str, name: str, *words: str, given: str | None = None) -> CommandResult:
        environ = {**self._environ, **variables(url)}
        result = CliRunner().invoke(BY_NAME[name], words, input=given, env=environ)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return CommandResult(result.exit_code, result.stdout, result.stderr)

    def export(self, url: str, *words: str) -> list[dict[str, Any]]:
        done = self(url, "export", *words)
        assert [done.returncode, done.stderr] == [0, ""]
        return [json.loads(line) for line in done.stdout.splitlines()]
