"""CC Manager's entry points: `python app.py` serves, `flask run --debug` is for development, `flask` runs commands."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit(f"CC Manager needs Python 3.11 to 3.14; this is {sys.version.split()[0]}.")

import atexit
import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from flask import Flask

from ccm import __version__, api
from ccm.core.service import Service
from ccm.errors import StartRefused
from ccm.log import configure
from ccm.server.listener import listener, shown_address
from ccm.server.server import Server
from ccm.settings.access import access_warnings, check_access
from ccm.settings.settings import Settings

HELP = """Usage: python app.py [--help | --version]

Starts the service and serves until SIGTERM or Ctrl-C. Its settings are environment variables, such as PORT and
DATABASE_PATH; ccm/docs/configuration.md lists them. `flask --help` lists the commands."""


def create_app(settings: Settings | None = None) -> Flask:
    """Return the Flask app of a new service, with its commands. Nothing is opened or started before the first request.

    Args:
        settings: read from the environment if None.
    """
    from ccm import cli  # noqa: PLC0415  # `python app.py` needs neither the commands nor their imports

    app = _make_app(settings, cli.check_default_files)
    cli.register(app)
    return app


def _make_app(settings: Settings | None, check_environment: Callable[[], None] = lambda: None) -> Flask:
    if settings is None:
        try:
            check_environment()
            settings = Settings.from_env(os.environ)
        except StartRefused as refusal:
            print(f"CC Manager does not start: {refusal}", file=sys.stderr)
            sys.exit(refusal.exit_code)
        configure(settings.log_level)
    app = Flask("ccm", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # no CORS: OPTIONS gets 405 like any other unknown method
    app.url_map.merge_slashes = False  # no redirects: their Location would repeat an unchecked Host
    service = Service(settings)
    api.register(app, service)
    atexit.register(service.close)
    return app


def main(arguments: Sequence[str] = ()) -> int:
    """Serve with waitress until SIGTERM or SIGINT.

    Returns:
        The exit code: 1 after a failure, 2 for an invalid setting, 3 for a database that cannot be used, 4 for an
        address that cannot be listened on.
    """
    if arguments:
        answers = {"--help": HELP, "-h": HELP, "--version": f"CC Manager {__version__}"}
        if len(arguments) == 1 and arguments[0] in answers:
            print(answers[arguments[0]])
            return 0
        print(
            "CC Manager does not start: app.py takes no arguments but --help and --version. Its settings are "
            "environment variables, and `flask --help` lists the commands.",
            file=sys.stderr,
        )
        return 2
    app = _make_app(None)
    service: Service = app.extensions["ccm"]
    settings = service.settings
    log = logging.getLogger("ccm")
    with ExitStack() as stack:
        try:
            check_access(settings)
            bound = stack.enter_context(listener(settings))
            server = Server(app, service, bound)
            service.start()
        except StartRefused as refusal:
            print(f"CC Manager does not start: {refusal}", file=sys.stderr)
            return refusal.exit_code
        except Exception:
            log.exception("CC Manager does not start: unexpected error", extra={"event": "start_failed"})
            return 1
        for sentence in access_warnings(settings):
            log.warning("%s", sentence, extra={"event": "access_unrestricted"})

        def on_ready() -> None:
            # Logged once signals are handled, because a supervisor that reads this line may send one at once.
            log.info("listening on %s", shown_address(bound), extra={"event": "listening_started"})
            # Only now, because it takes longer than the rest of a start. Requests are answered meanwhile.
            service.import_sdk()
            # The modules live as long as the process. A full collection would examine their 100,000 objects each time,
            # and hold up every thread meanwhile.
            gc.collect()
            gc.freeze()

        try:
            return 0 if server.run(on_ready) else 1
        except ImportError:
            log.exception(
                "the Claude Agent SDK cannot be imported, so the service stops: reinstall claude-agent-sdk",
                extra={"event": "sdk_import_failed"},
            )
            return 1


def flush_log() -> None:
    """Flush stderr. If its reader is gone, discard the rest, because Python would exit with 120 instead of our code."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


if __name__ == "__main__":
    code = main(sys.argv[1:])
    flush_log()
    sys.exit(code)
