"""`flask stand-in`."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Mapping
from pathlib import Path

import click

from ccm.cli.output import exit_on_refusal, print_error, print_line
from ccm.errors import CommandRefused
from ccm.testing.messages_api import MessagesAPI
from ccm.testing.script import DIRECTIVES
from ccm.testing.service_process import stand_in_variables

# A fixed port, so that the variables stay the same from one start to the next.
PORT = 3100
# What precedes the name of a variable, by the value of --print. The quotes are the same.
PREFIXES = {"shell": "export ", "env-file": ""}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HELP = """Serve a stand-in for the Messages API, so that real Claude Code runs without a login.

It listens on loopback until Ctrl-C or SIGTERM, and prints the variables to set for the service. The service keeps its
own settings. In the service's terminal:

\b
  eval "$(flask stand-in --print shell)"
  python app.py

Or write an environment file once, for systemd and for flask --env-file:

\b
  flask stand-in --print env-file > stand-in.env

The stand-in answers a prompt with a sentence that quotes it. A prompt with directives is a script: each call of the
model executes the next directive, and after the last one the model answers "Done.".

\b
"""


@click.command("stand-in", help=HELP + "\n".join(f"  {form:24}{does}" for form, does in DIRECTIVES.values()))
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0 takes a free one.")
@click.option(
    "--print", "form", type=click.Choice(tuple(PREFIXES)), help="Only print the variables for --port, and do not serve."
)
def stand_in_command(port: int, form: str | None) -> None:
    """Serve the stand-in, or print the variables for one."""
    with exit_on_refusal():
        if form is None:
            _serve(port)
        elif port:
            _print_variables(f"http://127.0.0.1:{port}", form)
        else:
            raise CommandRefused("Give the --port of the stand-in: a free one is known only once it is served.")


def _serve(port: int) -> None:
    """Serve until one of STOP_SIGNALS."""
    # Blocked before the first thread starts, because threads inherit this, and `sigwait` needs it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        api = MessagesAPI(port, keep_requests=False)
    except OSError as error:
        raise CommandRefused(f"The stand-in cannot listen on port {port}: {error.strerror}.") from None
    with api:
        print_error(f"The stand-in for the Messages API listens on {api.url} until Ctrl-C.\nFor the service, set:\n")
        _print_variables(api.url, "shell")
        signal.sigwait(STOP_SIGNALS)
        print_error("\nStopping.")


def _print_variables(url: str, form: str) -> None:
    for name, value in _variables(url).items():
        print_line(f"{PREFIXES[form]}{name}={shlex.quote(value) if value else ''}")


def _variables(url: str) -> Mapping[str, str]:
    """Return the variables of a service that calls the stand-in, whatever its user's own Claude Code is set up for."""
    return {
        **stand_in_variables(url),
        # Settings there could name another API, and a login there shall not be used.
        "CLAUDE_CONFIG_DIR": str(Path.home() / ".cache/cc-manager/stand-in"),
        "no_proxy": "127.0.0.1,localhost",
        # Each takes precedence over ANTHROPIC_BASE_URL.
        "CLAUDE_CODE_USE_BEDROCK": "",
        "CLAUDE_CODE_USE_VERTEX": "",
        "CLAUDE_CODE_USE_FOUNDRY": "",
    }
