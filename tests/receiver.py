"""A webhook receiver on loopback whose replies a test chooses."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from standardwebhooks import Webhook


@dataclass(frozen=True)
class Received:
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def run_and_type(self) -> tuple[str, str]:
        """The id of the run and the type of its event."""
        return self.json["data"]["run"]["id"], self.json["type"]

    def verified(self, secret: str) -> Any:
        """Return the payload.

        Raises:
            WebhookVerificationError: the signature is wrong.
        """
        return Webhook(secret).verify(self.body, dict(self.headers))


@dataclass(frozen=True)
class Reply:
    """A reply. With `drip` it sends byte after byte and never ends."""

    status: int = 204
    headers: Mapping[str, str] | None = None
    body: bytes = b""
    drip: bool = False


class Receiver:
    """A context manager. The requests are in `received`, in order of arrival.

    Args:
        port: the port of an earlier receiver that has closed; 0 takes a free one.
        reply: makes the reply to a request; it may block.
        tls: the context with its certificate; None serves plain HTTP.
    """

    def __init__(
        self,
        port: int = 0,
        reply: Callable[[Received], Reply] = lambda _: Reply(),
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.received: list[Received] = []
        self.reply = reply
        self.closing = threading.Event()
        self._has_arrived = threading.Condition()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.receiver = self
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        if tls is not None:
            self.url = f"https://localhost:{self.port}"
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(0.02), name="receiver")

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, received: Received) -> None:
        with self._has_arrived:
            self.received.append(received)
            self._has_arrived.notify_all()

    def wait_for(self, count: int, path: str = "", seconds: float = 30) -> list[Received]:
        """Wait for `count` requests whose path begins with `path` and return the first `count`."""

        def found() -> list[Received]:
            return [received for received in self.received if received.path.startswith(path)]

        with self._has_arrived:
            assert self._has_arrived.wait_for(lambda: len(found()) >= count, seconds), f"only {len(found())} arrived"
            return found()[:count]


class _Server(http.server.ThreadingHTTPServer):
    receiver: Receiver
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: the sender may disconnect at any time."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        receiver = self.server.receiver
        body = self.rfile.read(int(self.headers["Content-Length"]))
        received = Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        receiver.add(received)
        reply = receiver.reply(received)
        if reply.drip:
            while not receiver.closing.is_set():
                self.wfile.write(b"x")
                receiver.closing.wait(0.02)
        self.send_response(reply.status)
        for name, value in (reply.headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the requests are in `received`."""
