"""A server whose answers a test scripts, byte for byte, and a proxy that loses answers."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path
from typing import Any, Self

CHUNKED_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Script:
    """What is sent on a connection before it is closed. With `stays` it is kept open until the client leaves."""

    sent: bytes = b""
    stays: bool = False


def answer(status: int, body: Any, **headers: str) -> Script:
    """Return a JSON answer. Underscores in the names of headers stand for hyphens."""
    return raw_answer(status, json.dumps(body).encode(), Content_Type="application/json", **headers)


def raw_answer(status: int, body: bytes, **headers: str) -> Script:
    lines = [f"HTTP/1.1 {status} {http.client.responses[status]}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return Script("\r\n".join([*lines, "", ""]).encode() + body)


def error(status: int, code: str, message: str, field: str | None = None, **headers: str) -> Script:
    body = {"code": code, "message": message} | ({} if field is None else {"field": field})
    return answer(status, {"error": body}, **headers)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class ScriptedServer:
    """A context manager. It serves one connection at a time, with one request each.

    Args:
        reply: returns what to send for a request.
        certificate: a file with a certificate for localhost and its key; None serves plain HTTP.
    """

    def __init__(self, reply: Callable[[Request], Script], certificate: Path | None = None) -> None:
        self.requests: list[Request] = []
        self._reply = reply
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._tls: ssl.SSLContext | None = None
        if certificate is not None:
            self.url = f"https://localhost:{self._socket.getsockname()[1]}"
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        self._thread = threading.Thread(target=self._serve, name="scripted-server")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # the test is over
            # The client may leave at any time, and may not trust the certificate.
            with contextlib.suppress(OSError), self._secured(connection) as connection:
                request = _read(connection)
                self.requests.append(request)
                script = self._reply(request)
                connection.sendall(script.sent)
                if script.stays:
                    connection.recv(1)

    def _secured(self, connection: socket.socket) -> socket.socket:
        if self._tls is None:
            return connection
        with connection:
            return self._tls.wrap_socket(connection, server_side=True)


def one_after_another(*scripts: Script) -> Callable[[Request], Script]:
    """Return a `reply` that gives each answer once, and the last one for ever."""
    rest = list(scripts)
    return lambda _: rest.pop(0) if len(rest) > 1 else rest[0]


def losing_answers(url: str, losses: int) -> Callable[[Request], Script]:
    """Return a `reply` that passes requests on to a service, and loses its first answers."""
    left = [True] * losses
    host, port = url.removeprefix("http://").split(":")

    def reply(request: Request) -> Script:
        connection = http.client.HTTPConnection(host, int(port))
        connection.request(request.method, request.target, request.body or None, dict(request.headers))
        response = connection.getresponse()
        body = response.read()
        connection.close()
        if left:
            left.pop()
            return Script()
        headers = {name.replace("-", "_"): value for name, value in response.getheaders() if name != "Content-Length"}
        return raw_answer(response.status, body, **headers)

    return reply


def _read(connection: socket.socket) -> Request:
    with connection.makefile("rb") as file:
        method, target, _ = file.readline().decode().split()
        lines = iter(file.readline, b"\r\n")
        headers = BytesParser().parsebytes(b"".join(lines))
        return Request(method, target, dict(headers), file.read(int(headers.get("Content-Length", 0))))
