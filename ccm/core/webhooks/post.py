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
        parts = urlsplit(url)
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._headers = dict(headers)
        self._body = body
        self._seconds = seconds
        self._tls = tls if parts.scheme == "https" else None
        self._channel = _Channel(time.monotonic() + seconds)
        self._http = http.client.HTTPConnection(parts.hostname or "", parts.port or PORTS[parts.scheme])
        self._http.default_port = PORTS[parts.scheme]  # omitted from the Host header
        self._http.response_class = _Response
        self._http.sock = self._channel  # it has the methods that are used

    def send(self) -> Answer:
        """Send the request, and return the answer.

        Raises:
            NoAnswer: the receiver did not answer in time, or not with HTTP.
        """
        try:
            self._channel.connect(self._http.host, self._http.port, self._tls)
            # A receiver may answer (410, 413) and close the connection before it has read the whole body.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._http.request("POST", self._path, self._body, self._headers)
            with self._http.getresponse() as response:
                return Answer(response.status, response.getheader("Retry-After"))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswer(self._describe(error)) from None
        finally:
            self._channel.close()

    def abort(self) -> None:
        """End the request now, from another thread. The receiver may have got it anyway."""
        self._channel.abort()

    def _describe(self, error: Exception) -> str:
        if self._channel.aborted or isinstance(error, TimeoutError):
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


class _Response(http.client.HTTPResponse):
    def begin(self) -> None:
        """Read the head of the answer. Skip interim answers (103, Early Hints)."""
        super().begin()
        while http.HTTPStatus.SWITCHING_PROTOCOLS < self.status < http.HTTPStatus.OK:
            self.headers = None  # type: ignore[assignment]  # otherwise `begin` returns at once
            super().begin()


class _Channel:
    """A connection that ends at a deadline, with the methods of a socket that http.client uses.

    A socket's own timeout restarts with every call, so a receiver that sends single bytes would never time out.
    """

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self.aborted = False

    def connect(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        """Connect to the first address that works. Each gets an equal share of the remaining time."""
        # A slow lookup cannot be interrupted. If it passes the deadline, the next step raises TimeoutError.
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for left, (family, kind, protocol, _, address) in zip(range(len(addresses), 0, -1), addresses, strict=True):
            try:
                # Without IPv6 in the kernel this fails for an IPv6 address only. The next address may work.
                connection = socket.socket(family, kind, protocol)
                self._use(connection, share=left).connect(address)
                break
            except OSError:
                if left == 1 or self.aborted:
                    raise
        self._limited().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            secured = tls.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
            self._use(secured)
            secured.do_handshake()

    def _use(self, connection: socket.socket, share: int = 1) -> socket.socket:
        """Make `abort` reach a socket from now on, instead of the one before. Return it, as `_limited` does."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
            self._socket = connection
            if self.aborted:
                raise TimeoutError
        return self._limited(share)

    def _limited(self, share: int = 1) -> socket.socket:
        """Return the socket, its next call limited to the remaining time, or a share of it."""
        remaining = self._deadline - time.monotonic()
        if self._socket is None or remaining <= 0:
            raise TimeoutError
        self._socket.settimeout(remaining / share)
        return self._socket

    def sendall(self, data: bytes) -> None:
        """Send bytes in chunks, because the timeout of a TLS socket restarts with each call."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK_BYTES):
            self._limited().sendall(view[start : start + CHUNK_BYTES])

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Stream(self.receive))

    def receive(self, buffer: Any) -> int:
        return self._limited().recv_into(buffer)

    def abort(self) -> None:
        """End the connection from another thread."""
        with self._lock:
            self.aborted = True
            if self._socket is not None:
                with contextlib.suppress(OSError):  # not connected yet, or no longer
                    # Not the method of the TLS socket, because another thread is using that.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()


class _Stream(io.RawIOBase):
    def __init__(self, receive: Callable[[Any], int]) -> None:
        self._receive = receive

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._receive(buffer)
