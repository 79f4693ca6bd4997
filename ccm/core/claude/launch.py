"""How Claude Code's process is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ccm.core.claude.processes import inherited, launch_prefix
from ccm.core.claude.run_context import CLIConfig
from ccm.core.claude.run_directory import STDERR_FILE


@dataclass(frozen=True)
class Launch:
    """How the process is started.

    Args:
        prefix: the program, with its arguments, that executes Claude Code.
        environ: the variables that it inherits, apart from those in the SDK's options.
        stderr: the file that takes its stderr.
        open_files: its limit of open files; None for the service's own.
    """

    prefix: tuple[str, ...]
    environ: Mapping[str, str]
    stderr: Path
    open_files: int | None = None


def launch(cli_config: CLIConfig, directory: Path) -> Launch:
    """Return how the Claude Code of a run is started.

    Args:
        directory: the run's private directory.
    """
    return Launch(launch_prefix(), inherited(cli_config.environ), directory / STDERR_FILE, cli_config.open_files)
