"""The service inside the test's own process: the real app over a real database, called without a socket."""

from __future__ import annotations

import atexit
import io
import logging
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from unittest.mock import patch
from urllib.parse import unquote

from werkzeug.test import run_wsgi_app

from app import create_app
from ccm.core.service import Service
from ccm.log import OneLineFormatter
from ccm.settings.settings import Settings
from tests.client import Answer, Client, checked, prepared
from tests.conftest import stand_in_cli

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication, WSGIEnvironment

# Nothing listens here, so a test that needs a socket fails at once instead of reaching another service.
ADDRESS = "http://127.0.0.1:1"
LOOPBACK = "127.0.0.1"
# Waitress refuses other names and values before the app sees them; names with an underscore it drops.
HEADER_NAME = re.compile(r"[A-Za-z0-9-]+")
HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
TARGET = re.compile(r"[\x21-\x22\x24-\x7e]*")  # without "#", which waitress cuts off
# For these http.client says that there is no body; for the others it says nothing.
METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
# Header names that WSGI writes without the prefix HTTP_.
UNPREFIXED = frozenset({"CONTENT_TYPE", "CONTENT_LENGTH"})
# The variables of the machine that agents keep.
KEPT_VARIABLES = ("PATH", "LANG", "CI", "TMPDIR")


def environ_of(
    method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes = b"", peer: str = LOOPBACK
) -> WSGIEnvironment:
    """The WSGI environ that waitress makes of a request. tests/api/test_in_process.py compares the two.

    Raises:
        ValueError: waitress would refuse or change the request before the app sees it; test that over a socket.
    """
    path, _, query = target.partition("?")
    if not path or "://" in path or not TARGET.fullmatch(target):
        raise ValueError(f"the target {target!r} needs a socket")
    environ: WSGIEnvironment = {
        "REMOTE_ADDR": peer,
        "REMOTE_HOST": peer,
        "REMOTE_PORT": "1",
        "REQUEST_METHOD": method,
        "REQUEST_URI": target,
        "SERVER_NAME": LOOPBACK,
        "SERVER_PORT": "1",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "SERVER_SOFTWARE": "in-process",
        "SCRIPT_NAME": "",
        "PATH_INFO": re.sub("^/+", "/", unquote(path, "latin-1")),
        "QUERY_STRING": query,
        "waitress.client_disconnected": lambda: False,
        "wsgi.errors": sys.stderr,
        "wsgi.input": io.BytesIO(body),
        "wsgi.input_terminated": True,
        "wsgi.multiprocess": False,
        "wsgi.multithread": True,
        "wsgi.run_once": False,
        "wsgi.url_scheme": "http",
        "wsgi.version": (1, 0),
    }
    for name, value in headers:
        if not HEADER_NAME.fullmatch(name) or not HEADER_VALUE.fullmatch(value):
            raise ValueError(f"the header {name!r}: {value!r} needs a socket")
        key = name.upper().replace("-", "_")
        key = key if key in UNPREFIXED else f"HTTP_{key}"
        value = value.strip(" \t")  # noqa: PLW2901  # only the stripped value is ever seen
        environ[key] = f"{environ[key]}, {value}" if key in environ else value
    return environ


class InProcessClient(Client):
    """Calls an app directly, with the requests that `Client` sends.

    Args:
        peer: the address that the requests come from.
    """

    def __init__(self, app: WSGIApplication, peer: str = LOOPBACK) -> None:
        super().__init__(ADDRESS)
        self.app = app
        self._peer = peer

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Answer:
        data, sent = prepared(body, headers)
        names = {name.lower() for name in sent}
        own = {"Host": f"{self.host}:{self.port}", "Accept-Encoding": "identity"}
        if data is not None or method in METHODS_WITH_BODY:
            own["Content-Length"] = str(len(data or b""))
        lines = [(name, value) for name, value in own.items() if name.lower() not in names]
        return self.send(method, path, [*lines, *sent.items()], data or b"")

    def send(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes = b"") -> Answer:
        """Send exactly these headers, of which several may have one name."""
        environ = environ_of(method, target, headers, body, self._peer)
        chunks, status, answered = run_wsgi_app(self.app, environ, buffered=True)
        answer = Answer(int(status.split()[0]), dict(answered), b"".join(chunks))
        return checked(method, target, body or None, answer)


class InProcessService:
    """A started service with a client and its log; a context manager.

    Several may run at once. Each then also has the log lines of the others, as they share Python's loggers.

    Args:
        folder: a directory for its database, its agents' HOME and the stand-in CLI.
        variables: its settings, named as in the environment.
    """

    def __init__(self, folder: Path, **variables: object) -> None:
        self.log: list[str] = []
        self._folder = folder
        own = {"DATABASE_PATH": folder / "db.sqlite", "CCM_CLI_PATH": stand_in_cli(folder)} | variables
        self._settings = Settings.from_env({name: str(value) for name, value in own.items()})
        self._stack = ExitStack()
        self.client: InProcessClient

    def __enter__(self) -> Self:
        kept = {
            name: value for name, value in os.environ.items() if name in KEPT_VARIABLES or name.startswith("PYTEST_")
        }
        with ExitStack() as stack:
            # The SDK hands this process's environment to the agents, whatever the service's own copy says.
            stack.enter_context(patch.dict(os.environ, {**kept, "HOME": str(self._folder)}, clear=True))
            _capture_log(stack, self.log)
            app = create_app(self._settings)
            service: Service = app.extensions["ccm"]
            stack.callback(atexit.unregister, service.close)
            stack.callback(service.close)
            service.start()
            self.client = InProcessClient(app)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        assert not [line for line in self.log if "Traceback" in line], "the service logged a stack trace"


def _capture_log(stack: ExitStack, lines: list[str]) -> None:
    """Append everything that is logged to `lines`, formatted as the service's log, until the stack is closed."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, root, own = Lines(), logging.getLogger(), logging.getLogger("ccm")
    handler.setFormatter(OneLineFormatter())
    root.addHandler(handler)
    stack.callback(root.removeHandler, handler)
    stack.callback(own.setLevel, own.level)
    own.setLevel(logging.DEBUG)
