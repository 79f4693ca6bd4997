"""One POST that is over in time, without redirects or a proxy, and without reading more than the answer's head."""

from __future__ import annotations

import contextlib
import http
import http.client
import io
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from ccm.settings.webhook_urls import PORTS

# A record of TLS has as many at the most.
PIECE_BYTES = 2**14


@dataclass(frozen=True)
class Answer:
    """Of a receiver: the status, and its `Retry-After`."""

    status: int
    retry_after: str | None


class NoAnswer(Exception):
    """Why there was none, in words that anybody may read."""


class Post:
    """
    Args:
        seconds: for all of it, from the connection to the status.
        tls: whom to trust.
    """

    def __init__(self, url: str, headers: Mapping[str, str], body: bytes, seconds: float, tls: ssl.SSLContext) -> None:
        self._url = url
        self._headers = headers
        self._body = body
        self._seconds = seconds
        self._connection = _Connection(url, time.monotonic() + seconds, tls)

    def send(self) -> Answer:
        """
        Raises:
            NoAnswer: there was none.
        """
        try:
            parts = urlsplit(self._url)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            self._connection.connect()
            # Who has read enough answers and hangs up, amid the body that is still being sent: `410` or `413`.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.request("POST", path, self._body, dict(self._headers))
            with self._connection.getresponse() as response:
                return Answer(response.status, response.getheader("Retry-After"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswer(self._told(error)) from None
        finally:
            self._connection.close()

    def abort(self) -> None:
        """End it now, from another thread. It may have arrived all the same."""
        self._connection.abort()

    def _told(self, error: Exception) -> str:
        if self._connection.is_cut or isinstance(error, TimeoutError):
            return f"no answer within {self._seconds:g} s"
        if isinstance(error, socket.gaierror):
            return f"the host cannot be found: {error.strerror}"
        if isinstance(error, UnicodeError):
            return "the host cannot be found: it has a part that is too long for a name"
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate cannot be trusted: {error.verify_message}"
        if isinstance(error, ssl.SSLError):
            return f"TLS failed: {error.reason or type(error).__name__}"
        if isinstance(error, http.client.RemoteDisconnected):
            return "the connection was closed without an answer"
        if isinstance(error, OSError):
            return f"the connection failed: {error.strerror or type(error).__name__}"
        return f"the answer is no HTTP: {type(error).__name__}"


class _InTime(io.RawIOBase):
    """What a socket receives.

    Args:
        received: as the socket gives it, whose timeout begins anew with every byte: a receiver that drips its answer
            would never be done with.
        limit: sets that timeout to what is left of the time. Raises TimeoutError if nothing is.
    """

    def __init__(self, received: io.RawIOBase, limit: Callable[[], None]) -> None:
        self._received = received
        self._limit = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._limit()
        read: int | None = self._received.readinto(buffer)
        return read

    def close(self) -> None:
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, limit: Callable[[], None], sock: socket.socket, method: str | None = None) -> None:
        super().__init__(sock, method=method)
        self.fp = io.BufferedReader(_InTime(self.fp.detach(), limit))

    def begin(self) -> None:
        """Read the head of the answer, beyond what only announces it (103, Early Hints)."""
        super().begin()
        while http.HTTPStatus.SWITCHING_PROTOCOLS < self.status < http.HTTPStatus.OK:
            self.headers = None  # type: ignore[assignment]  # else it counts as read
            super().begin()


class _Connection(http.client.HTTPConnection):
    def __init__(self, url: str, deadline: float, tls: ssl.SSLContext) -> None:
        parts = urlsplit(url)
        super().__init__(parts.hostname or "", parts.port or PORTS[parts.scheme])
        self.default_port = PORTS[parts.scheme]  # left out of the Host header
        self._tls = tls if parts.scheme == "https" else None
        self._deadline = deadline
        self._lock = threading.Lock()
        self.is_cut = False
        self.response_class = partial(_Response, self._limit)  # type: ignore[assignment]

    def connect(self) -> None:
        # A name that the system takes long to look up cannot be cut short, but what follows is told that time is over.
        places = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for left, place in zip(range(len(places), 0, -1), places, strict=True):
            try:
                self._reach(place, share=left)
                break
            except OSError:
                if left == 1 or self.is_cut:
                    raise
        self._limit()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            secured = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self._use(secured)
            secured.do_handshake()

    def _reach(self, place: tuple[Any, ...], share: int) -> None:
        family, kind, protocol, _, address = place
        # Where the kernel has no IPv6 this alone fails, and the next address may do.
        connection = socket.socket(family, kind, protocol)
        try:
            self._use(connection, share)
            connection.connect(address)
        except OSError:
            connection.close()
            raise

    def send(self, data: Any) -> None:
        """Send bytes in pieces, because a TLS socket takes its timeout anew for each that it sends."""
        view = memoryview(data)
        for start in range(0, len(view), PIECE_BYTES):
            self._limit()
            super().send(view[start : start + PIECE_BYTES])

    def _limit(self) -> None:
        """Have the next call of the socket take no longer than the time that remains."""
        self.sock.settimeout(self._remaining())

    def _remaining(self) -> float:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        return remaining

    def _use(self, connection: socket.socket, share: int = 1) -> None:
        """Have a socket that `cut` reaches from now on, with a share of the time that remains."""
        with self._lock:
            self.sock = connection
            if self.is_cut:
                raise TimeoutError
        connection.settimeout(self._remaining() / share)

    def abort(self) -> None:
        with self._lock:
            self.is_cut = True
            if self.sock is not None:
                with contextlib.suppress(OSError):  # not connected yet, or not any more
                    # Not the method of a TLS socket, which another thread is using.
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
