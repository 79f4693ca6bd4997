"""`flask demo`."""

from __future__ import annotations

import click

from ccm.cli.output import exit_on_refusal
from ccm.demo.tour import Tour


@click.command("demo")
@click.option("--serve", is_flag=True, help="Keep the service running afterwards, for curl.")
def demo_command(serve: bool) -> None:
    """Start, resume and fork real runs without a login.

    The real Claude Code runs against a stand-in of the Messages API, on a free port (with --serve on PORT, or else
    3000), with a temporary database. All other settings in the environment are ignored.
    """
    with exit_on_refusal():
        Tour(click.echo).run(serve)
