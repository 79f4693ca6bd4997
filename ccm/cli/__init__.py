"""The commands of `flask` beside `flask run`.

`migrate`, `import` and `prune` bring the schema up to date. They take the service lock, so they are refused while a
service runs on the same database. `export` and `prune --dry-run` can run beside it, and require an up-to-date schema.
"""

from __future__ import annotations

from flask import Flask

from ccm.cli.archive import export_command, import_command, prune_command
from ccm.cli.database import migrate_command
from ccm.cli.demo import demo_command
from ccm.cli.openapi import openapi_command
from ccm.cli.token import token_command

COMMANDS = (
    migrate_command,
    demo_command,
    token_command,
    openapi_command,
    export_command,
    import_command,
    prune_command,
)


def register(app: Flask) -> None:
    """Add the commands to an app."""
    for command in COMMANDS:
        app.cli.add_command(command)
