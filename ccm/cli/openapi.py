"""`flask openapi`."""

from __future__ import annotations

import click
from flask import current_app
from flask.cli import with_appcontext

from ccm.api.http.extensions import document
from ccm.cli.output import exit_on_refusal, write
from ccm.core.service import Service


@click.command("openapi")
@with_appcontext
def openapi_command() -> None:
    """Print the description of the API, the same OpenAPI document as GET /openapi.json."""
    service: Service = current_app.extensions["ccm"]
    with exit_on_refusal():
        write(document().text(service.settings.url_prefix))
