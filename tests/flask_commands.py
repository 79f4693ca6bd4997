"""The `flask` commands, called in the test's process because starting a process takes a second."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from ccm.cli import COMMANDS

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
