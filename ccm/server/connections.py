"""waitress' connections, with bounds on how long a client may be slow, on how many there are, and on their memory.

A client that dawdles holds no thread (waitress reads in its one listening thread), but it holds a connection, and one
that takes no answer holds a thread as well. A proxy in front is slow with nobody; these bounds are for when there is
none.

This file and server/server.py alone reach into waitress: this one into its connections and its loop, that one into its
tasks and its end. tests/contracts/test_waitress.py fails first when an upgrade takes something of it away.

Large bodies and answers are kept in temporary files as long as there is room for such files. Agents can fill it.
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
from waitress.adjustments import Adjustments
from waitress.buffers import OverflowableBuffer, ReadOnlyFileBasedBuffer
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import TcpWSGIServer, UnixWSGIServer
from waitress.task import ThreadedTaskDispatcher
from waitress.utilities import Error

from ccm.file_limits import SHORTAGES

log = logging.getLogger(__name__)

# Seconds from the first byte of a request until its headers are there, and until all of its body is.
HEADER_TIMEOUT = 30.0
REQUEST_TIMEOUT = 600.0
# Seconds in which a client neither sends nor takes a byte that it should. More than a proxy keeps an idle connection.
IDLE_TIMEOUT = 120
# How often the connections are looked through.
POLL_INTERVAL = 5
# How long nobody is let in after a connection could not be accepted, and how soon a second fault of the loop has to
# come to be answered with a pause.
ACCEPT_DELAY = 1.0
# Larger pieces of an answer wait in a file for the client that takes them.
FILE_BYTES = 2**20


class _NoRoom(Error):  # type: ignore[misc]  # waitress has no type hints
    code = 503
    reason = "Service Unavailable"


class _Body(OverflowableBuffer):  # type: ignore[misc]
    """The body of a request, in memory or in a file. It is dropped if there is no room for the file."""

    dropped = False

    def append(self, data: bytes) -> None:
        if self.dropped:
            return
        try:
            super().append(data)
        except OSError as error:
            self.dropped = True
            log.warning("a request is refused: its body cannot be kept in a temporary file: %s", error.strerror)
            self.close()

    def close(self) -> None:
        try:
            super().close()
        except OSError:
            # The file is closed all the same. Bytes that found no room are written once more then.
            log.debug("a temporary file could not be written to its end")


class Parser(HTTPRequestParser):  # type: ignore[misc]
    """A request on its way. One whose body has been dropped is refused when the whole body has been received: a client
    reads no answer while it sends."""

    # Waitress logs it of each client that leaves before it is answered, and fails where a request had none.
    path = ""
    error: Error | None = None

    def parse_header(self, header_plus: bytes) -> None:
        super().parse_header(header_plus)
        if self.body_rcv is not None:
            self.body_rcv.buf = _Body(self.adj.inbuf_overflow)

    def received(self, data: bytes) -> int:
        consumed = int(super().received(data))
        if self.completed and self.error is None and self.body_rcv is not None and self.body_rcv.buf.dropped:
            self.error = _NoRoom("no room for temporary files")
        return consumed


class Channel(HTTPChannel):  # type: ignore[misc]
    """One connection, which knows since when a request is on its way."""

    _since = 0.0
    # When bytes were first seen to wait for the client, and its last activity then.
    _waiting: tuple[float, float] | None = None

    def received(self, data: bytes) -> bool:
        before = self.request
        taken = bool(super().received(data))
        if self.request is not before:
            self._since = time.monotonic()
        return taken

    def write_soon(self, data: Any) -> int:
        if len(data) >= FILE_BYTES and not isinstance(data, ReadOnlyFileBasedBuffer):
            data = ReadOnlyFileBasedBuffer(_file_of(data))
            data.prepare()
        return int(super().write_soon(data))

    def is_too_slow(self) -> bool:
        """Whether its request is too long under way, or its answer is not being taken. Asked every POLL_INTERVAL."""
        now = time.monotonic()
        if self.total_outbufs_len:
            # Not since the last activity alone: an answer that was waited for has only just begun.
            if self._waiting is None or self._waiting[1] != self.last_activity:
                self._waiting = now, self.last_activity
            return now - self._waiting[0] > IDLE_TIMEOUT
        self._waiting = None
        if self.request is None or self.requests:
            return False
        return now - self._since > (REQUEST_TIMEOUT if self.request.headers_finished else HEADER_TIMEOUT)


def _file_of(data: bytes) -> IO[bytes]:
    """A piece of an answer as a file; in memory, where there is no room for a temporary one."""
    with ExitStack() as opened:
        try:
            file = opened.enter_context(tempfile.TemporaryFile(buffering=0))
            if file.write(data) == len(data):
                file.seek(0)
                opened.pop_all()
                return file
        except OSError as error:
            log.debug("there is no room for a temporary file: %s", error.strerror)
    return BytesIO(data)


class _Bounds:
    """What a listening server does about slow clients and a lack of descriptors; waitress' own class comes behind."""

    _no_accept_before = 0.0
    _short = False
    # The last fault that was logged, so that one which stays is logged once.
    _fault = ""
    active_channels: dict[int, Channel]

    def maintenance(self, now: float) -> None:
        super().maintenance(now)  # type: ignore[misc]
        for channel in list(self.active_channels.values()):
            if channel.is_too_slow():
                # Not by `will_close`: that waits until the client takes what there is to send.
                channel.handle_close()

    def readable(self) -> bool:
        wanted = super().readable()  # type: ignore[misc]
        return bool(wanted) and time.monotonic() >= self._no_accept_before

    def accept(self) -> Any:
        try:
            accepted = super().accept()  # type: ignore[misc]
        except OSError as error:
            if error.errno not in SHORTAGES:
                raise
            # The connection stays in the backlog: tried again at once, this would go on at full load.
            self._no_accept_before = time.monotonic() + ACCEPT_DELAY
            if not self._short:
                log.error("no new connection can be accepted: %s", error.strerror)  # noqa: TRY400  # no trace needed
            self._short = True
            return None
        if accepted is not None and self._short:
            self._short = False
            log.warning("new connections are accepted again")
        return accepted

    def handle_error(self) -> None:
        """Go on after a fault with one new connection: waitress would close the listening socket."""
        self._no_accept_before = time.monotonic() + ACCEPT_DELAY
        fault = repr(sys.exception())
        if fault != self._fault:
            self._fault = fault
            log.exception("a new connection could not be taken in")

    def handle_close(self) -> None:
        """End the loop, as the listening socket is broken. A stop closes it otherwise."""
        raise wasyncore.ExitNow


class _TcpServer(_Bounds, TcpWSGIServer):  # type: ignore[misc]
    pass


class _UnixServer(_Bounds, UnixWSGIServer):  # type: ignore[misc]
    pass


def open_server(app: Any, bound: socket.socket, channel: type[Channel], threads: int, **settings: Any) -> Any:
    """A waitress server that listens on a bound socket.

    Args:
        settings: of waitress (waitress.adjustments).
    """
    adjustments = Adjustments(
        sockets=[bound], channel_timeout=IDLE_TIMEOUT, cleanup_interval=POLL_INTERVAL, threads=threads, **settings
    )
    dispatcher = ThreadedTaskDispatcher()
    dispatcher.set_thread_count(threads)
    kind = _UnixServer if bound.family == socket.AF_UNIX else _TcpServer
    server = kind(
        app,
        _sock=bound,
        dispatcher=dispatcher,
        adj=adjustments,
        sockinfo=(bound.family, bound.type, bound.proto, bound.getsockname()),
        bind_socket=False,
    )
    server.channel_class = channel
    return server


def serve(server: Any) -> None:
    """Run a server's loop for as long as it can listen, whatever one round of it raises."""
    told, failed_at = "", -ACCEPT_DELAY
    while True:
        try:
            server.run()
        except wasyncore.ExitNow:
            pass
        except Exception as error:
            if repr(error) != told:  # a fault that stays is logged once
                told = repr(error)
                log.exception("a round of the listener failed, the next one follows")
            if time.monotonic() < failed_at + ACCEPT_DELAY:
                time.sleep(ACCEPT_DELAY)  # else it would fail at full load
            failed_at = time.monotonic()
            continue
        log.error("nobody can connect any more: the listening socket is closed")
        return
