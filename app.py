"""CC Manager's entry: `python app.py` serves, `flask run --debug` develops, `flask migrate` and `flask demo` help."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 14):
    sys.exit(f"CC Manager needs Python 3.11 to 3.14; this is {sys.version.split()[0]}.")

import atexit
import logging
import os
from contextlib import ExitStack

from flask import Flask

from ccm import api
from ccm.core.service import Service
from ccm.errors import StartRefused
from ccm.log import configure
from ccm.server.listener import listener, shown_address
from ccm.server.server import Server
from ccm.settings.access import access_warnings, check_access
from ccm.settings.settings import Settings


def create_app(settings: Settings | None = None) -> Flask:
    """The app over one service, with its commands. Opens nothing and starts no thread: the first request does.

    Args:
        settings: those of the environment if left out.
    """
    from ccm import cli  # noqa: PLC0415  # `python app.py` needs neither the commands nor their imports

    app = _make_app(settings)
    cli.register(app)
    return app


def _make_app(settings: Settings | None) -> Flask:
    if settings is None:
        settings = _settings()
        configure(settings.log_level)
    app = Flask("ccm", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # no CORS: OPTIONS is as unknown as any other method
    app.url_map.merge_slashes = False  # no redirects: they would name a Host that may be none
    service = Service(settings)
    api.register(app, service)
    atexit.register(service.close)
    return app


def _settings() -> Settings:
    """Those of the environment. Ends the program with a sentence if one cannot be used."""
    try:
        return Settings.from_env(os.environ)
    except StartRefused as refusal:
        print(f"CC Manager does not start: {refusal}", file=sys.stderr)
        sys.exit(refusal.exit_code)


def main() -> int:
    """Serve with waitress until SIGTERM or SIGINT. The exit code: 2 for a bad setting, 3 for a refused database."""
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
            log.exception("CC Manager does not start, because of a fault")
            return 1
        for sentence in access_warnings(settings):
            log.warning("%s", sentence)

        def on_ready() -> None:
            # Said when a signal is heeded already: who reads it may send one at once.
            log.info("listening on %s", shown_address(bound))
            # Only now: it takes longer than the rest of a start, and requests are answered meanwhile.
            service.import_sdk()

        try:
            return 0 if server.run(on_ready) else 1
        except ImportError:
            log.exception("the Claude Agent SDK cannot be imported, so the service stops: reinstall claude-agent-sdk")
            return 1


def flush_log() -> None:
    """Write out what is left of the log. Where nobody takes it any more, Python itself would end with 120."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


if __name__ == "__main__":
    code = main()
    flush_log()
    sys.exit(code)
