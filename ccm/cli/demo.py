"""`flask demo`."""

from __future__ import annotations

import click

from ccm.cli.output import exit_on_refusal
from ccm.demo.tour import Tour


@click.command("demo")
@click.option("--serve", is_flag=True, help="Keep the service running afterwards, for curl.")
def demo_command(serve: bool) -> None:
    """Start, resume and fork real runs without a login.

    The real Claude Code runs against a stand-in for the Messages API. Without --serve the service has a free port, a
    temporary database, and none of the settings in the environment. With it the settings in the environment count.
    PORT is then 3000 unless it is set, and the database is temporary unless DATABASE_PATH or DATABASE_URL is set.
    """
    with exit_on_refusal():
        Tour(click.echo).run(serve)
