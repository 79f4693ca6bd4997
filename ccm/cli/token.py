"""`flask token`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from ccm.cli.output import exit_on_refusal, print_error, print_line
from ccm.errors import BadSetting
from ccm.settings.token_file import NAME, add_token, new_token


@click.command("token")
@click.argument("name")
def token_command(name: str) -> None:
    """Make a token for a client, and add it to the file in CCM_API_TOKEN_FILE if that is set."""
    if not NAME.fullmatch(name):
        raise click.BadParameter("must have 1 to 64 letters, digits, '.', '_' and '-'", param_hint="NAME")
    file = os.environ.get("CCM_API_TOKEN_FILE")
    token = new_token()
    place = "Put this line into a file of mode 0600 and name it in CCM_API_TOKEN_FILE."
    with exit_on_refusal():
        if file:
            try:
                add_token(Path(file), name, token)
            except OSError as error:
                raise BadSetting(str(error)) from None
            place = f"It is in {file} now."
        print_line(f"{name}:{token}")
    print_error(f"{place} Clients send 'Authorization: Bearer TOKEN'; TOKEN is the part after the colon.")
