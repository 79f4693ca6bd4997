"""Waitress's connections, with limits on slow clients, on descriptors and on memory.

A client that sends slowly holds no thread, because waitress reads in its one listening thread, but it holds a
connection. A client that reads slowly holds a thread as well. A reverse proxy shields the service from both; these
limits are for services without one.

Large bodies and answers are buffered in temporary files. Agents can fill the disk that holds them.

Only this file and server/server.py use waitress's private parts: this one those of its connections and its loop, the
other one those of its tasks and its shutdown. tests/contracts/test_waitress.py names them.
"""

from __future__ import annotations

import logging
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from io import BytesIO
from typing import IO, Any

from waitress import wasyncore
from waitress.buffers import OverflowableBuffer, ReadOnlyFileBasedBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import TcpWSGIServer, UnixWSGIServer
from waitress.utilities import Error

from ccm.file_limits import SHORTAGES

log = logging.getLogger(__name__)

# Seconds from the first byte of a request to the end of its headers, and to the end of its body.
HEADER_TIMEOUT = 30.0
REQUEST_TIMEOUT = 600.0
# Seconds without a byte in either direction, or with an answer that the client does not read. It is longer than a proxy
# keeps an idle connection, so that the proxy never sends a request on a connection that is being closed.
IDLE_TIMEOUT = 120
# Seconds between two checks of all connections.
POLL_INTERVAL = 5
# Seconds before the next connection is accepted, after one could not be. The listener's loop also pauses for this long
# if it fails twice within this time.
ACCEPT_DELAY = 1.0
# Chunks of an answer from this size on are buffered in a file until the client has read them.
LARGE_CHUNK_BYTES = 2**20


class _OutOfDisk(Error):  # type: ignore[misc]  # waitress has no type hints
    code = 503
    reason = "Service Unavailable"


class _RequestBody(OverflowableBuffer):  # type: ignore[misc]
    """The body of a request, in memory or in a file. It is dropped if the disk has no room for the file."""

    dropped = False

    def append(self, data: bytes) -> None:
        if self.dropped:
            return
        try:
            super().append(data)
        except OSError as error:
            self.dropped = True
            log.warning(
                "request refused: its body does not fit into a temporary file: %s",
                error.strerror,
                extra={"event": "request_body_dropped"},
            )
            self.close()

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            # The file is closed all the same: only the flush of its unwritten bytes failed, on a full disk.
            log.debug("a temporary file could not be flushed")


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """A request that is being received.

    A request whose body was dropped is refused only at the end of its body, because a client that is sending reads no
    answer.
    """

    # Waitress logs the path of each client that leaves early, and raises AttributeError if the request had none.
    path = ""
    error: Error | None = None

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.body_rcv is not None:
            self.body_rcv.buf = _RequestBody(self.adj.inbuf_overflow)

    def received(self, data: bytes) -> int:
        consumed = int(super().received(data))
        if self.completed and self.error is None and self.body_rcv is not None and self.body_rcv.buf.dropped:
            self.error = _OutOfDisk("no room for temporary files")
        return consumed


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection, with the times that its limits are measured from."""

    _request_started = 0.0
    # When unsent bytes were first seen, and the connection's `last_activity` at that time.
    _unsent_since: tuple[float, float] | None = None

    def received(self, data: bytes) -> bool:
        before = self.request
        accepted = bool(super().received(data))
        if self.request is not before:
            self._request_started = time.monotonic()
        return accepted

    def write_soon(self, data: Any) -> int:
        if len(data) >= LARGE_CHUNK_BYTES and not isinstance(data, ReadOnlyFileBasedBuffer):
            data = ReadOnlyFileBasedBuffer(_to_file(data))
            data.prepare()
        return int(super().write_soon(data))

    def is_too_slow(self) -> bool:
        """Return whether the client sends its request or reads its answer too slowly. Called every POLL_INTERVAL."""
        now = time.monotonic()
        if self.total_outbufs_len:
            # Measured from here and not from the last activity, which may be long ago: after a `?wait=` the answer has
            # only just begun.
            if self._unsent_since is None or self._unsent_since[1] != self.last_activity:
                self._unsent_since = now, self.last_activity
            return now - self._unsent_since[0] > IDLE_TIMEOUT
        self._unsent_since = None
        if self.request is None or self.requests:
            return False
        return now - self._request_started > (REQUEST_TIMEOUT if self.request.headers_finished else HEADER_TIMEOUT)


def _to_file(data: bytes) -> IO[bytes]:
    """Return a chunk of an answer as a temporary file, or in memory if the disk has no room for it."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(tempfile.TemporaryFile(buffering=0))
            if file.write(data) == len(data):
                file.seek(0)
                stack.pop_all()
                return file
        except OSError as error:
            log.debug("a large chunk is kept in memory, no temporary file: %s", error.strerror)
    return BytesIO(data)


class _ServerLimits:
    """A mixin for waitress's servers: drops slow clients, and survives a lack of descriptors and failed connections."""

    _accept_after = 0.0
    _out_of_descriptors = False
    # The last exception that was logged: one that repeats is logged once.
    _last_error = ""
    active_channels: dict[int, Channel]

    def maintenance(self, now: float) -> None:
        super().maintenance(now)  # type: ignore[misc]
        for channel in list(self.active_channels.values()):
            if channel.is_too_slow():
                # Not `will_close`, which waits until the client has read the rest of its answer.
                channel.handle_close()

    def readable(self) -> bool:
        readable = super().readable()  # type: ignore[misc]
        return bool(readable) and time.monotonic() >= self._accept_after

    def accept(self) -> Any:
        try:
            accepted = super().accept()  # type: ignore[misc]
        except OSError as error:
            if error.errno not in SHORTAGES:
                raise
            # The connection stays in the backlog. Without a pause the loop would retry it at full load.
            self._accept_after = time.monotonic() + ACCEPT_DELAY
            if not self._out_of_descriptors:
                log.error(  # noqa: TRY400  # no trace needed
                    "cannot accept new connections: %s", error.strerror, extra={"event": "accept_failed"}
                )
            self._out_of_descriptors = True
            return None
        if accepted is not None and self._out_of_descriptors:
            self._out_of_descriptors = False
            log.warning("new connections are accepted again", extra={"event": "accept_recovered"})
        return accepted

    def handle_error(self) -> None:
        """Log why a new connection failed and keep listening. Waitress would close the listening socket."""
        self._accept_after = time.monotonic() + ACCEPT_DELAY
        error = repr(sys.exception())
        if error != self._last_error:
            self._last_error = error
            log.exception("a new connection failed and was dropped", extra={"event": "connection_failed"})

    def handle_close(self) -> None:
        """End the loop: the listening socket is broken. A regular stop calls `close` instead."""
        raise wasyncore.ExitNow


class _TcpServer(_ServerLimits, TcpWSGIServer):  # type: ignore[misc]
    pass


class _UnixServer(_ServerLimits, UnixWSGIServer):  # type: ignore[misc]
    pass


def open_server(app: Any, bound: socket.socket, channel: type[Channel], **settings: Any) -> Any:
    """Return a waitress server that listens on a bound socket.

    Args:
        channel: the class of its connections.
        settings: more of waitress's settings (waitress.adjustments).
    """
    server_class = _UnixServer if bound.family == socket.AF_UNIX else _TcpServer
    server = server_class(
        app,
        _sock=bound,
        sockinfo=(bound.family, bound.type, bound.proto, bound.getsockname()),
        bind_socket=False,
        sockets=[bound],
        channel_timeout=IDLE_TIMEOUT,
        cleanup_interval=POLL_INTERVAL,
        **settings,
    )
    server.channel_class = channel
    return server


def serve(server: Any) -> None:
    """Run a server's loop until its listening socket is closed, restarting the loop after any other exception."""
    last_error, failed_at = "", -ACCEPT_DELAY
    while True:
        try:
            server.run()
            break
        except wasyncore.ExitNow:
            break
        except Exception as error:
            if repr(error) != last_error:  # one that repeats is logged once
                last_error = repr(error)
                log.exception("the listener's loop failed and is restarted", extra={"event": "listener_failed"})
            if time.monotonic() < failed_at + ACCEPT_DELAY:
                time.sleep(ACCEPT_DELAY)  # a persistent failure would take a whole core
            failed_at = time.monotonic()
    log.error("the listening socket is closed: no client can connect", extra={"event": "listener_closed"})
