"""`flask version`."""

from __future__ import annotations

import platform
from importlib.metadata import version

import click

from ccm import __version__
from ccm.cli.output import print_line


@click.command("version")
def version_command() -> None:
    """Print the versions of CC Manager and of what it runs on. (`flask --version` prints Flask's only.)"""
    print_line(f"CC Manager {__version__}")
    for name, package in (("Claude Agent SDK", "claude-agent-sdk"), ("Flask", "flask")):
        print_line(f"{name} {version(package)}")
    print_line(f"Python {platform.python_version()}")
