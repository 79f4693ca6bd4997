"""The commands of `flask` beside `flask run`.

`migrate`, `import` and `prune` bring the schema up to date. They take the service lock, so they are refused while a
service runs on the same database. `export` and `prune --dry-run` can run beside it, and require an up-to-date schema.
"""

from __future__ import annotations

from flask import Flask

from ccm.cli.archive import export_command, import_command, prune_command
from ccm.cli.database import migrate_command
from ccm.cli.demo import demo_command
from ccm.cli.env_file import check_default_files
from ccm.cli.openapi import openapi_command
from ccm.cli.stand_in import stand_in_command
from ccm.cli.token import token_command
from ccm.cli.version import version_command

__all__ = ["COMMANDS", "check_default_files", "register"]

COMMANDS = (
    migrate_command,
    demo_command,
    stand_in_command,
    token_command,
    openapi_command,
    export_command,
    import_command,
    prune_command,
    version_command,
)


def register(app: Flask) -> None:
    """Add the commands to an app."""
    for command in COMMANDS:
        app.cli.add_command(command)
