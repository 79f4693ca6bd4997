"""One POST with a total deadline. It follows no redirect, uses no proxy, and reads only the head of the answer."""

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

# The size of the chunks to send: the largest TLS record.
CHUNK_BYTES = 2**14


@dataclass(frozen=True)
class Answer:
    """The status of a receiver's answer, and its `Retry-After` header."""

    status: int
    retry_after: str | None


class NoAnswer(Exception):
    """The receiver did not answer. The message may be shown to clients."""


class Post:
    """A POST request to a receiver.

    Args:
        seconds: the time from the lookup of the host to the status line.
        tls: the trusted certificates.
    """

    def __init__(self, url: str, headers: Mapping[str, str], body: bytes, seconds: float, tls: ssl.SSLContext) -> None:
        self._url = url
        self._headers = headers
        self._body = body
        self._seconds = seconds
        self._connection = _Connection(url, time.monotonic() + seconds, tls)

    def send(self) -> Answer:
        """Send the request, and return the answer.

        Raises:
            NoAnswer: the receiver did not answer in time, or not with HTTP.
        """
        try:
            parts = urlsplit(self._url)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            self._connection.connect()
            # A receiver may answer (410, 413) and close the connection before it has read the whole body.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.request("POST", path, self._body, dict(self._headers))
            with self._connection.getresponse() as response:
                return Answer(response.status, response.getheader("Retry-After"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswer(self._describe(error)) from None
        finally:
            self._connection.close()

    def abort(self) -> None:
        """End the request now, from another thread. The receiver may have got it anyway."""
        self._connection.abort()

    def _describe(self, error: Exception) -> str:
        if self._connection.aborted or isinstance(error, TimeoutError):
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


class _DeadlineReader(io.RawIOBase):
    """A stream from a socket that ends at the deadline.

    A socket's own timeout restarts with every read, so a receiver that sends single bytes would never time out.

    Args:
        source: the stream of the socket.
        set_timeout: sets the socket's timeout to the remaining time. Raises TimeoutError if none is left.
    """

    def __init__(self, source: io.RawIOBase, set_timeout: Callable[[], None]) -> None:
        self._source = source
        self._set_timeout = set_timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._set_timeout()
        read: int | None = self._source.readinto(buffer)
        return read

    def close(self) -> None:
        self._source.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, set_timeout: Callable[[], None], sock: socket.socket, method: str | None = None) -> None:
        super().__init__(sock, method=method)
        self.fp = io.BufferedReader(_DeadlineReader(self.fp.detach(), set_timeout))

    def begin(self) -> None:
        """Read the head of the answer. Skip interim answers (103, Early Hints)."""
        super().begin()
        while http.HTTPStatus.SWITCHING_PROTOCOLS < self.status < http.HTTPStatus.OK:
            self.headers = None  # type: ignore[assignment]  # otherwise `begin` returns at once
            super().begin()


class _Connection(http.client.HTTPConnection):
    def __init__(self, url: str, deadline: float, tls: ssl.SSLContext) -> None:
        parts = urlsplit(url)
        super().__init__(parts.hostname or "", parts.port or PORTS[parts.scheme])
        self.default_port = PORTS[parts.scheme]  # omitted from the Host header
        self._tls = tls if parts.scheme == "https" else None
        self._deadline = deadline
        self._lock = threading.Lock()
        self.aborted = False
        self.response_class = partial(_Response, self._set_timeout)  # type: ignore[assignment]

    def connect(self) -> None:
        # A slow lookup cannot be interrupted. If it passes the deadline, the next step raises TimeoutError.
        addresses = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            try:
                self._connect_to(address, share=left)
                break
            except OSError:
                if left == 1 or self.aborted:
                    raise
        self._set_timeout()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._tls is not None:
            secured = self._tls.wrap_socket(self.sock, server_hostname=self.host, do_handshake_on_connect=False)
            self._use(secured)
            secured.do_handshake()

    def _connect_to(self, info: tuple[Any, ...], share: int) -> None:
        family, kind, protocol, _, address = info
        # Without IPv6 in the kernel this fails for an IPv6 address only. The next address may work.
        connection = socket.socket(family, kind, protocol)
        try:
            self._use(connection, share)
            connection.connect(address)
        except OSError:
            connection.close()
            raise

    def send(self, data: Any) -> None:
        """Send bytes in chunks, because the timeout of a TLS socket restarts with each call."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            self._set_timeout()
            super().send(view[start : start + CHUNK_BYTES])

    def _set_timeout(self, share: int = 1) -> None:
        """Limit the next call of the socket to the remaining time, or a share of it."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self.sock.settimeout(remaining / share)

    def _use(self, connection: socket.socket, share: int = 1) -> None:
        """Make `abort` reach a socket from now on, and limit it to a share of the remaining time."""
        with self._lock:
            self.sock = connection
            if self.aborted:
                raise TimeoutError
        self._set_timeout(share)

    def abort(self) -> None:
        with self._lock:
            self.aborted = True
            if self.sock is not None:
                with contextlib.suppress(OSError):  # not connected yet, or no longer
                    # Not the method of the TLS socket, because another thread is using that.
                    socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
