"""HTTP connections to a service, at the address that its log shows."""

from __future__ import annotations

import http.client
import socket
from urllib.parse import urlsplit


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, like `curl --unix-socket`."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def connection(url: str, timeout: float) -> http.client.HTTPConnection:
    """Return a new connection, which is opened by its first request.

    Args:
        url: `http://...` or `unix:/path`.
        timeout: of each operation on the socket (seconds).
    """
    if url.startswith("unix:"):
        return UnixConnection(url.removeprefix("unix:"), timeout)
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=timeout)
